"""Frozen: multimodal few-shot learning with frozen language models (Tsimpoukelis et al., NeurIPS 2021, arXiv 2106.13884).

Section 3.1 and figure 2: a vision encoder, an NF-ResNet, is trained to speak to a language model whose weights stay as they are.
The output vector after its final global pooling is mapped linearly to k · D numbers, which are k embeddings of the language
model's width: the *visual prefix* (k = 2 worked best). It stands in the sequence like the embeddings of k tokens, anywhere and
any number of times, which is how few-shot prompts with several images are read (section 3.3).

The encoder is a small NF-ResNet of the paper's kind (normaliser-free, Brock et al., arXiv 2101.08692): scaled weight
standardisation in place of batch normalisation,

    Ŵ = γ · (W − μ_W) / (σ_W · √N)                       (its equation 1; N the fan-in, γ = √(2 / (1 − 1/π)) for ReLU)
    h_{i+1} = h_i + α · f_i(h_i / β_i),  β_i² = Var(h_i)  (its section 3; Var grows by α² a block, and is 1 after a transition)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .visual_tokens import VisualTokensConfig, VisualTokensForCausalLM

_GAIN = math.sqrt(2 / (1 - 1 / math.pi))


class FrozenConfig(VisualTokensConfig):
    """`prefix_tokens`: k. `channels`, `depth`: widths of the encoder's stages and blocks in each; a stage halves the picture."""

    model_type = "frozen"

    prefix_tokens: int = 2
    image_size: int = 224
    num_channels: int = 3
    channels: list[int] | tuple[int, ...] = (32, 64, 128)
    depth: int = 1
    alpha: float = 0.2

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        return self.prefix_tokens


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and variance 1 / fan-in, times a learned gain for each."""

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1) -> None:
        super().__init__(before, after, kernel, stride, padding=kernel // 2)
        self.gain = nn.Parameter(torch.ones(after, 1, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        fan_in = self.weight[0].numel()
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        variance = self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
        weight = self.gain * (self.weight - mean) * torch.rsqrt((variance * fan_in).clamp(min=1e-4))
        return nn.functional.conv2d(pixels, weight, self.bias, self.stride, self.padding)


class Block(nn.Module):
    """h + α · f(h / β); the first of a stage halves the picture, and its shortcut reads h / β too."""

    def __init__(self, before: int, after: int, alpha: float, beta: float, first: bool) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta
        self.conv1 = StandardisedConv2d(before, after, 3, 2 if first else 1)
        self.conv2 = StandardisedConv2d(after, after, 3)
        self.shortcut = StandardisedConv2d(before, after, 1, 2) if first else None
        self.skip_gain = nn.Parameter(torch.ones(1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(hidden / self.beta) * _GAIN
        kept = hidden if self.shortcut is None else self.shortcut(inner)
        inner = self.conv2(torch.relu(self.conv1(inner)) * _GAIN)
        return kept + self.alpha * self.skip_gain * inner


class NFResNet(nn.Module):
    """`pixel_values [images, channels, size, size]` → the pooled vector `[images, channels[-1]]`."""

    def __init__(self, config: FrozenConfig) -> None:
        super().__init__()
        widths = list(config.channels)
        self.stem = StandardisedConv2d(config.num_channels, widths[0], 3, 2)
        blocks: list[nn.Module] = []
        variance = 1.0
        for stage, width in enumerate(widths):
            for number in range(config.depth):
                first = number == 0
                before = widths[max(stage - 1, 0)] if first else width
                blocks.append(Block(before, width, config.alpha, math.sqrt(variance), first))
                variance = (1.0 if first else variance) + config.alpha**2
        self.blocks = nn.Sequential(*blocks)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        maps = torch.relu(self.blocks(self.stem(pixel_values))) * _GAIN
        return maps.mean((2, 3))


class VisualPrefix(nn.Module):
    """`[images, channels]` → k embeddings `[images, k, hidden]`."""

    def __init__(self, config: FrozenConfig) -> None:
        super().__init__()
        text: Any = config.text_config
        self.tokens = config.prefix_tokens
        self.linear = nn.Linear(list(config.channels)[-1], self.tokens * text.hidden_size)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        prefix: torch.Tensor = self.linear(pooled)
        return prefix.reshape(pooled.shape[0], self.tokens, -1)


class FrozenForConditionalGeneration(VisualTokensForCausalLM):
    """See the module's docstring; a prompt has k image tokens for each image. Only the encoder and the prefix learn."""

    config_class = FrozenConfig

    def __init__(self, config: FrozenConfig) -> None:
        super().__init__(config)
        self.vision_encoder = NFResNet(config)
        self.visual_prefix = VisualPrefix(config)
        self.post_init()
        self.language_model.requires_grad_(False)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        pooled = self.vision_encoder(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=pooled, pooler_output=self.visual_prefix(pooled))


AutoConfig.register("frozen", FrozenConfig, exist_ok=True)
AutoModelForImageTextToText.register(FrozenConfig, FrozenForConditionalGeneration, exist_ok=True)
