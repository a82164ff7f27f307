"""PaLM-E: an embodied multimodal language model (Driess et al., ICML 2023, arXiv 2303.03378).

Section 3: a *multi-modal sentence* interleaves words with continuous observations. An encoder φ: O → X^q maps an observation to a
row of vectors in the space of word embeddings (equation 2),

    x_i = γ(w_i)          where the i-th token is a word,
    x_i = φ_j(O_j)_i      where it belongs to observation O_j,

and a decoder-only language model reads them like words; what follows is text. Section 4 gives the encoders carried here:

- state estimation vectors: an MLP φ_state maps a state s ∈ R^S (poses, sizes, colours of objects) to one embedding;
- ViT: its tokens x̃ = φ̃_ViT(I), and a learned affine map ψ where their width is not the language model's, x_i = ψ(x̃_i).

The answer is text: a plan whose steps are words (section 3, "Embodying the output"), or a command of a low-level policy. For
commands as numbers this model takes the tokens of its successor RT-2 (arXiv 2307.15818, section 3.2): each dimension of an
action is cut into bins (256) of equal width, and a bin is one token; for PaLM-E these are the least used of the vocabulary, a
run of which `action_tokens` names together with each dimension's bounds.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .visual_tokens import VisualTokensConfig, VisualTokensForCausalLM, as_config


class PaLMEConfig(VisualTokensConfig):
    """`state_size`: S. `state_token_id`: the token that stands for a state. `class_token`: whether ViT's first token is no patch.

    `action_tokens`: {first_token, bins, low, high}, bounds of one action dimension each; None for a model that writes plans.
    """

    model_type = "palm_e"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "vision_config": AutoConfig}

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    state_size: int = 16
    state_hidden_size: int = 128
    state_token_id: int = 5
    class_token: bool = True
    action_tokens: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = as_config(self.vision_config, "vit")
        super().__post_init__(**kwargs)

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        vision: Any = self.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)


class StateEncoder(nn.Module):
    """φ_state: `states [states, S]` → `[states, hidden]`."""

    def __init__(self, config: PaLMEConfig) -> None:
        super().__init__()
        text: Any = config.text_config
        self.fc1 = nn.Linear(config.state_size, config.state_hidden_size)
        self.fc2 = nn.Linear(config.state_hidden_size, text.hidden_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        encoded: torch.Tensor = self.fc2(torch.relu(self.fc1(states)))
        return encoded


class PaLMEForConditionalGeneration(VisualTokensForCausalLM):
    """See the module's docstring; `pixel_values` and `states` in the order of their tokens, over all rows of a batch."""

    config_class = PaLMEConfig

    def __init__(self, config: PaLMEConfig) -> None:
        super().__init__(config)
        vision: Any = config.vision_config
        text: Any = config.text_config
        self.vision_tower = AutoModel.from_config(vision)
        self.image_map = nn.Linear(vision.hidden_size, text.hidden_size)
        self.state_encoder = StateEncoder(config)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        hidden = self.vision_tower(pixel_values, return_dict=True).last_hidden_state
        tokens = hidden[:, 1:] if self.config.class_token else hidden
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=self.image_map(tokens))

    def other_features(self, **inputs: Any) -> list[tuple[int, torch.Tensor]]:
        return [(self.config.state_token_id, self.state_encoder(inputs["states"]))]


AutoConfig.register("palm_e", PaLMEConfig, exist_ok=True)
AutoModelForImageTextToText.register(PaLMEConfig, PaLMEForConditionalGeneration, exist_ok=True)
