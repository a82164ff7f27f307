"""SimVLM: Simple Visual Language Model Pretraining with Weak Supervision (Wang et al., ICLR 2022, arXiv 2108.10904).

One Transformer learns from a single objective. An image is read as a sequence of patches that stands before its text; the first
T_p tokens, image included, are the *prefix*, which is seen in both directions, and the rest is written token by token (section
3.1, equation 3):

    L_PrefixLM(θ) = −E_{x∼D} [ log P_θ(x_≥Tp | x_<Tp) ] = −E_{x∼D} [ Σ_{i=Tp}^{T} log P_θ(x_i | x_[Tp,i], x_<Tp) ]

where equation 2 is the plain language model (T_p = 0). In training T_p is drawn at random, never smaller than the image
(`T_p ≥ T_i`); here the caller says it, by `labels` that are −100 on the prefix.

Form. The paper notes that the objective fits a decoder-only model and an encoder-decoder one alike, and trains the latter for its
results. This is the decoder-only form: one stack of layers whose mask is bidirectional on the prefix and causal after it. It is
equation 3 as it stands, with one set of weights for x_<Tp and x_≥Tp, and the smaller of the two.

Section 3.2: raw pixels go through a convolution stage, the first three blocks of a ResNet (arXiv 1512.03385), in the place of
ViT's linear patch projection; image and text have learned positions of their own. The paper's further relative attention among
the patches is left out. Layers are those of ViT (arXiv 2010.11929): normalised before attention and before the feed-forward part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class SimVLMConfig(PreTrainedConfig):
    """Sizes of a SimVLM. An image of `image_size` pixels becomes (image_size / stride)² patches, stride = 4 · stem_stride.

    `conv_channels`: widths of the three convolution blocks; `conv_depth`: residual units in each.
    `max_position_embeddings`: the longest text. `image_token_id`: the token that stands for a patch in `input_ids`.
    """

    model_type = "simvlm"

    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 128
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    image_size: int = 64
    num_channels: int = 3
    stem_stride: int = 4
    conv_channels: list[int] | tuple[int, ...] = (32, 64, 128)
    conv_depth: int = 1
    initializer_range: float = 0.02
    image_token_id: int = 4
    pad_token_id: int | None = 3
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True

    @property
    def image_tokens(self) -> int:
        """T_i: patches of one image."""
        return int((self.image_size // (4 * self.stem_stride)) ** 2)


class ResidualUnit(nn.Module):
    """Two 3 × 3 convolutions around a shortcut (arXiv 1512.03385, equation 2)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        inner = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(pixels)))))
        return torch.relu(inner + self.shortcut(pixels))


class ConvStage(nn.Module):
    """`pixel_values [images, channels, size, size]` → patches in reading order `[images, T_i, conv_channels[-1]]`."""

    def __init__(self, config: SimVLMConfig) -> None:
        super().__init__()
        widths = list(config.conv_channels)
        step = config.stem_stride
        self.stem = nn.Conv2d(config.num_channels, widths[0], 2 * step - 1, step, step - 1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        units: list[nn.Module] = []
        for index, width in enumerate(widths):
            for depth in range(config.conv_depth):
                first = depth == 0
                units.append(ResidualUnit(widths[max(index - 1, 0)] if first else width, width, 2 if first and index else 1))
        self.blocks = nn.Sequential(*units)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        maps = self.blocks(torch.relu(self.norm(self.stem(pixel_values))))
        return maps.flatten(2).transpose(1, 2)


class ImageEmbedding(nn.Module):
    """Patches `[images, T_i, channels]` → `[images, T_i, hidden]`, with a learned position each."""

    def __init__(self, config: SimVLMConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(config.conv_channels[-1], config.hidden_size)
        self.positions = nn.Embedding(config.image_tokens, config.hidden_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.projection(patches) + self.positions.weight


def _eager(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q kᵀ · scaling + mask) v."""
    scores = query @ key.transpose(-1, -2) * scaling
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


class SelfAttention(nn.Module):
    """Multi-head attention of the sequence to itself and to the cache."""

    is_causal = True

    def __init__(self, config: SimVLMConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, past: Cache | None) -> torch.Tensor:
        rows = hidden.shape[:-1]
        query, key, value = (
            part(hidden).view(*rows, -1, self.head_dim).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past is not None:
            key, value = past.update(key, value, self.layer)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(str(self.config._attn_implementation), _eager)
        output, _ = attend(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5)
        mixed: torch.Tensor = self.out_proj(output.reshape(*rows, -1))
        return mixed


class Layer(nn.Module):
    """h ← h + attention(norm(h)); h ← h + mlp(norm(h))."""

    def __init__(self, config: SimVLMConfig, layer: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.self_attn = SelfAttention(config, layer)
        self.fc1, self.fc2 = nn.Linear(width, config.intermediate_size), nn.Linear(config.intermediate_size, width)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, past: Cache | None) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.norm1(hidden), attention_mask, past)
        return hidden + self.fc2(self.act(self.fc1(self.norm2(hidden))))


class SimVLMPreTrainedModel(PreTrainedModel):
    """What transformers wants to know."""

    config_class = SimVLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _supports_sdpa = True
    _supports_attention_backend = True


class SimVLMDecoder(SimVLMPreTrainedModel):
    """Text positions and layers. Position 0 is an image's patch, which has its own in its embedding; text counts from 1."""

    def __init__(self, config: SimVLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings + 1, config.hidden_size, padding_idx=0)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_init()

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        past_key_values: Cache | None = None,
    ) -> BaseModelOutputWithPast:
        hidden = inputs_embeds + self.positions(position_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class SimVLMForConditionalGeneration(SimVLMPreTrainedModel, GenerationMixin):
    """`input_ids` begin with T_i image tokens, then the text. `token_type_ids`: 0 is the prefix, 1 what follows causally.

    Without token types everything is causal; with `labels` the prefix ends before the first label; `generate` takes the whole
    prompt as the prefix.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "decoder.embed_tokens.weight"}

    def __init__(self, config: SimVLMConfig) -> None:
        super().__init__(config)
        self.conv_stage = ConvStage(config)
        self.image_embedding = ImageEmbedding(config)
        self.decoder = SimVLMDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.embed_tokens = value  # type: ignore[assignment]

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """`[images, channels, size, size]` → `pooler_output [images, T_i, hidden]`."""
        patches = self.conv_stage(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=self.image_embedding(patches))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            assert input_ids is not None, "where the image stands is read off input_ids"
            features = self.get_image_features(pixel_values).pooler_output
            here = (input_ids == self.config.image_token_id)[..., None].expand_as(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(here, features)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if labels is not None and token_type_ids is None:
            token_type_ids = ((labels != -100).cumsum(-1) > 0).long()
        if position_ids is None:
            before = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = self._text_positions(torch.arange(before, before + inputs_embeds.shape[1])[None])
        mask = self.create_masks_for_generate(
            self.config, inputs_embeds, attention_mask, past_key_values, position_ids, token_type_ids
        )
        hidden = self.decoder(
            inputs_embeds, attention_mask=mask, position_ids=position_ids, past_key_values=past_key_values
        ).last_hidden_state
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        first = bool(kwargs.get("is_first_iteration", False))
        types = kwargs.pop("token_type_ids", None)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = self._text_positions(inputs["position_ids"])
        if first:
            inputs["token_type_ids"] = torch.zeros_like(input_ids) if types is None else types
        else:
            inputs["pixel_values"] = None
        return inputs

    def _text_positions(self, index: torch.Tensor) -> torch.Tensor:
        """Positions of the tokens at `index` of their row: the image's are 0, the text's 1, 2 …"""
        return (index - (self.config.image_tokens - 1)).clamp(min=0)

    @staticmethod
    def create_masks_for_generate(
        config: PreTrainedConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The mask of equation 3, from token types `[batch, past and new tokens]`; causal without them.

        Positions are kept from transformers, which would take an image's zeros for many sequences packed into one.
        """
        return create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            block_sequence_ids=None if token_type_ids is None else torch.where(token_type_ids == 0, 0, -1),
        )


AutoConfig.register("simvlm", SimVLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(SimVLMConfig, SimVLMForConditionalGeneration, exist_ok=True)
