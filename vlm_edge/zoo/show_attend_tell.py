"""Show, Attend and Tell: Neural Image Caption Generation with Visual Attention (Xu et al., ICML 2015, arXiv 1502.03044).

A convolutional network gives one vector a_i per place of the image (section 3.1.1); an LSTM writes the caption and looks at the
image anew for every word (section 3.1.2), here with the deterministic "soft" attention of section 4.2:

    e_ti = f_att(a_i, h_{t−1})        α_ti = softmax_i(e_ti)                                  (equations 4, 5)
    ẑ_t  = β_t · Σ_i α_ti a_i         β_t = σ(f_β(h_{t−1}))                                    (equation 13; section 4.2.1)
    i, f, o, g = (σ, σ, σ, tanh)(T [E y_{t−1}; h_{t−1}; ẑ_t])                                   (equation 1)
    c_t = f ⊙ c_{t−1} + i ⊙ g         h_t = o ⊙ tanh(c_t)                                      (equations 2, 3)
    p(y_t | a, y_<t) ∝ exp(L_o(E y_{t−1} + L_h h_t + L_z ẑ_t))                                 (equation 7)

f_att is a perceptron with one hidden layer; c_0 and h_0 are two perceptrons of the mean of the a_i. Training adds the doubly
stochastic term λ Σ_i (1 − Σ_t α_ti)² (equation 14), so that every place is looked at over a whole caption.

The paper reads VGG's fourth convolution block, 14 × 14 × 512; here it is a small network of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch._higher_order_ops.scan import scan
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

States = tuple[torch.Tensor, torch.Tensor]
"""h and c, each `[batch, hidden]`."""


class ShowAttendTellConfig(PreTrainedConfig):
    """Sizes. Each of `conv_channels` halves the image but the first: an image of `image_size` has (image_size / 2^(n−1))² places.

    `attention_penalty` is λ of equation 14.
    """

    model_type = "show_attend_tell"

    vocab_size: int = 512
    hidden_size: int = 128
    attention_dim: int = 128
    image_size: int = 64
    num_channels: int = 3
    conv_channels: list[int] | tuple[int, ...] = (32, 64, 96, 128, 128)
    max_position_embeddings: int = 128
    attention_penalty: float = 0.1
    initializer_range: float = 0.02
    pad_token_id: int | None = 3
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    use_cache: bool = False

    @property
    def places(self) -> int:
        """L: how many vectors an image has."""
        return int((self.image_size >> (len(self.conv_channels) - 1)) ** 2)


@dataclass
class ShowAttendTellOutput(ModelOutput):
    """`logits [batch, tokens, vocabulary]`, `attention [batch, tokens, places]` (α of each token), and `loss` when asked for."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    attention: torch.Tensor | None = None


class ConvEncoder(nn.Module):
    """`pixel_values [images, channels, size, size]` → `a [images, places, width]`, in reading order."""

    def __init__(self, config: ShowAttendTellConfig) -> None:
        super().__init__()
        widths = [config.num_channels, *config.conv_channels]
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(before, after, 3, 2 if index else 1, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.layers(pixel_values).flatten(2).transpose(1, 2)


class AttendingLSTM(nn.Module):
    """The decoder; see the module's equations."""

    def __init__(self, config: ShowAttendTellConfig) -> None:
        super().__init__()
        hidden, width, attention = config.hidden_size, int(config.conv_channels[-1]), config.attention_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.init_h, self.init_c = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.attend_image = nn.Linear(width, attention)
        self.attend_state = nn.Linear(hidden, attention)
        self.attend_score = nn.Linear(attention, 1)
        self.gate = nn.Linear(hidden, 1)
        self.from_word = nn.Linear(hidden, 4 * hidden)
        self.from_state = nn.Linear(hidden, 4 * hidden)
        self.from_image = nn.Linear(width, 4 * hidden)
        self.out_state, self.out_image = nn.Linear(hidden, hidden), nn.Linear(width, hidden)
        self.lm_head = nn.Linear(hidden, config.vocab_size)

    def begin(self, features: torch.Tensor) -> States:
        """h_0 and c_0 of the images' mean vector."""
        mean = features.mean(1)
        return torch.tanh(self.init_h(mean)), torch.tanh(self.init_c(mean))

    def forward(
        self, embeddings: torch.Tensor, features: torch.Tensor, keys: torch.Tensor, states: States
    ) -> tuple[torch.Tensor, torch.Tensor, States]:
        """`embeddings [batch, tokens, hidden]`, the image's `features` and `keys` (`attend_image` of them), h and c before →

        logits `[batch, tokens, vocabulary]`, attention `[batch, tokens, places]`, h and c after the last token.
        """

        def step(carry: States, word: torch.Tensor) -> tuple[States, tuple[torch.Tensor, ...]]:
            before, memory = carry
            score = self.attend_score(torch.tanh(keys + self.attend_state(before)[:, None])).squeeze(-1)
            weights = score.softmax(-1)
            seen = torch.sigmoid(self.gate(before)) * (weights[..., None] * features).sum(1)
            i, f, o, g = (word + self.from_state(before) + self.from_image(seen)).chunk(4, -1)
            memory = torch.sigmoid(f) * memory + torch.sigmoid(i) * torch.tanh(g)
            after = torch.sigmoid(o) * torch.tanh(memory)
            return (after, memory), (after.clone(), seen.clone(), weights.clone())

        words = self.from_word(embeddings).transpose(0, 1)
        if torch.compiler.is_exporting():  # one graph for any number of tokens
            states, (after, seen, weights) = scan(step, states, words, dim=0)
        else:  # the same, many times faster while training
            told = []
            for word in words:
                states, outputs = step(states, word)
                told.append(outputs)
            after, seen, weights = (torch.stack(parts) for parts in zip(*told, strict=True))
        spoken = embeddings + self.out_state(after.transpose(0, 1)) + self.out_image(seen.transpose(0, 1))
        return self.lm_head(spoken), weights.transpose(0, 1), states


class ShowAttendTellForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Captions images: `generate(pixel_values)`."""

    config_class = ShowAttendTellConfig
    main_input_name = "input_ids"
    base_model_prefix = "model"

    def __init__(self, config: ShowAttendTellConfig) -> None:
        super().__init__(config)
        self.encoder = ConvEncoder(config)
        self.decoder = AttendingLSTM(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.embed_tokens = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.lm_head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ShowAttendTellOutput:
        if pixel_values is None or (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pixel_values, and either input_ids or inputs_embeds, must be given")
        features = self.encoder(pixel_values)
        embeddings = self.decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        keys = self.decoder.attend_image(features)
        logits, attention, _ = self.decoder(embeddings, features, keys, self.decoder.begin(features))
        loss = None
        if labels is not None:
            told = labels[:, 1:] != -100
            loss = nn.functional.cross_entropy(logits[:, :-1][told], labels[:, 1:][told])
            looked = (attention[:, :-1] * told[..., None]).sum(1)
            loss = loss + self.config.attention_penalty * (1.0 - looked).square().sum(-1).mean()
        return ShowAttendTellOutput(loss=loss, logits=logits, attention=attention)

    def generate(self, pixel_values: torch.Tensor, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Captions of `pixel_values [images, channels, size, size]`; they begin with `bos_token_id` (or with `input_ids`)."""
        if input_ids is None:
            begin = int(self.generation_config.bos_token_id or self.config.bos_token_id)
            input_ids = torch.full((len(pixel_values), 1), begin, dtype=torch.long, device=pixel_values.device)
        return super().generate(input_ids=input_ids, pixel_values=pixel_values, **{**kwargs, "use_cache": False})

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """The whole text so far: this reference keeps no state between steps."""
        return {"input_ids": input_ids, "pixel_values": kwargs["pixel_values"]}


AutoConfig.register(ShowAttendTellConfig.model_type, ShowAttendTellConfig)
AutoModelForImageTextToText.register(ShowAttendTellConfig, ShowAttendTellForConditionalGeneration)
