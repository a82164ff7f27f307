"""VisualGPT: Data-efficient Adaptation of Pretrained Language Models for Image Captioning (Chen et al., CVPR 2022,
arXiv 2102.10407).

A visual encoder and a pretrained GPT-2 in whose layers cross-attention to the image is put between self-attention and
feed-forward. What the image says and what the language model knows are balanced by the *self-resurrecting activation unit*
(section 3.2): for the state H of the self-attention,

    B_vis = σ(H) · 1(σ(H) > τ)          B_lan = (1 − σ(H)) · 1(1 − σ(H) > τ)                 (equation 6)
    Z     = B_vis ⊗ EncDecAttn(H, I) + B_lan ⊗ H                                              (equation 4)

A gate below the threshold τ is 0, and with it its gradient through the gate; but unlike complementary gates that sum to 1, both
can recover independently while the other one moves ("self-resurrecting").

The paper's encoder reads regions from an object detector; here it is a Vision Transformer (any encoder that transformers'
VisionEncoderDecoderModel takes), whose patches stand in for the regions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)
from transformers.cache_utils import Cache
from transformers.models.gpt2.modeling_gpt2 import GPT2Block


class VisualGPTTextConfig(GPT2Config):
    """GPT-2 with cross-attention; `gate_threshold` is τ (0.2 in the paper)."""

    model_type = "visual_gpt_text"

    gate_threshold: float = 0.2
    add_cross_attention: bool = True
    is_decoder: bool = True


class VisualGPTConfig(VisionEncoderDecoderConfig):
    """An image encoder's configuration (`encoder`) and a VisualGPTTextConfig (`decoder`)."""

    model_type = "visual_gpt"


class SelfResurrectingGate(nn.Module):
    """H `[…, hidden]`, attended `[…, hidden]` → Z; see the module's equations."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        visual = torch.sigmoid(states)
        language = 1.0 - visual
        visual = visual * (visual > self.threshold).to(visual.dtype)
        language = language * (language > self.threshold).to(language.dtype)
        return visual * attended + language * states


class VisualGPTBlock(GPT2Block):
    """A layer of GPT-2 whose cross-attention enters through the gate instead of a sum."""

    def __init__(self, config: VisualGPTTextConfig, layer_idx: int | None = None) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.gate = SelfResurrectingGate(config.gate_threshold)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        own, _ = self.attn(
            self.ln_1(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        states = hidden_states + own
        if encoder_hidden_states is not None:
            attended, _ = self.crossattention(
                self.ln_cross_attn(states),
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
            )
            states = self.gate(states, attended)
        return states + self.mlp(self.ln_2(states))


class VisualGPTForCausalLM(GPT2LMHeadModel):
    """The decoder by itself: GPT-2's names and weights, so a pretrained GPT-2 loads into it."""

    config_class = VisualGPTTextConfig

    def __init__(self, config: VisualGPTTextConfig) -> None:
        super().__init__(config)
        self.transformer.h = nn.ModuleList(VisualGPTBlock(config, layer_idx=i) for i in range(config.n_layer))
        self.post_init()


class VisualGPTForConditionalGeneration(VisionEncoderDecoderModel):
    """Captions images: `generate(pixel_values)`."""

    config_class = VisualGPTConfig


AutoConfig.register(VisualGPTTextConfig.model_type, VisualGPTTextConfig)
AutoConfig.register(VisualGPTConfig.model_type, VisualGPTConfig)
AutoModelForCausalLM.register(VisualGPTTextConfig, VisualGPTForCausalLM)
AutoModelForImageTextToText.register(VisualGPTConfig, VisualGPTForConditionalGeneration)
