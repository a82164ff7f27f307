"""MiniGPT-v2: large language model as a unified interface for vision-language multi-task learning (arXiv 2310.09478).

Section 2.1 and figure 2: a frozen vision encoder (EVA) gives a long row of visual tokens; four adjacent ones are concatenated and
projected together into one embedding of the language model (LLaMA-2). Neighbours are neighbours in the encoder's row, in reading
order; its class token is left out. At 448 pixels and patches of 14 that makes 256 tokens out of 1,024.

Section 2.2: a prompt is `[INST] <Img> <ImageFeature> </Img> [task] instruction [/INST]`; the task is one of `TASKS`, and a place
in the picture is written `{<x_left><y_top><x_right><y_bottom>}` with whole numbers from 0 to 100.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .visual_tokens import VisualTokensConfig, VisualTokensForCausalLM, as_config

TASKS = ("[vqa]", "[caption]", "[grounding]", "[refer]", "[identify]", "[detection]")
"""Task identifiers (section 2.2): question answering, captions, grounded captions, referring, naming a place, finding objects."""


class MiniGPTv2Config(VisualTokensConfig):
    """`merge`: how many adjacent visual tokens become one (4). `vision_feature_layer`: which hidden states are read.

    `class_token`: whether the encoder's first token is no patch.
    """

    model_type = "minigpt_v2"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "vision_config": AutoConfig}

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    merge: int = 4
    vision_feature_layer: int = -1
    class_token: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = as_config(self.vision_config, "clip_vision_model")
        super().__post_init__(**kwargs)

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        vision: Any = self.vision_config
        return int((vision.image_size // vision.patch_size) ** 2 // self.merge)


class AdjacentTokensProjector(nn.Module):
    """`[images, tokens, vision_hidden]` → `[images, tokens / merge, hidden]`: adjacent tokens end to end, then a linear layer."""

    def __init__(self, config: MiniGPTv2Config) -> None:
        super().__init__()
        vision: Any = config.vision_config
        text: Any = config.text_config
        self.merge = config.merge
        self.linear = nn.Linear(vision.hidden_size * config.merge, text.hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        images, count, width = tokens.shape
        merged: torch.Tensor = self.linear(tokens.reshape(images, count // self.merge, width * self.merge))
        return merged


class MiniGPTv2ForConditionalGeneration(VisualTokensForCausalLM):
    """See the module's docstring; a prompt has `config.image_tokens` image tokens for each image."""

    config_class = MiniGPTv2Config

    def __init__(self, config: MiniGPTv2Config) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.projector = AdjacentTokensProjector(config)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        seen = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
        hidden = seen.hidden_states[self.config.vision_feature_layer]
        tokens = hidden[:, 1:] if self.config.class_token else hidden
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=self.projector(tokens))


AutoConfig.register("minigpt_v2", MiniGPTv2Config, exist_ok=True)
AutoModelForImageTextToText.register(MiniGPTv2Config, MiniGPTv2ForConditionalGeneration, exist_ok=True)
