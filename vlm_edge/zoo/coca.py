"""CoCa: Contrastive Captioners are Image-Text Foundation Models (Yu et al., TMLR 2022, arXiv 2205.01917).

One image encoder and one text decoder, trained for both L_Con and L_Cap (equations 2 and 3): the first half of the decoder's
layers (*unimodal*) reads text alone, with a [CLS] token after it whose state is the text's vector; the second half (*multimodal*)
also attends to the image (section 3.2, "Decoupled Text Decoder"). The image is pooled by attention with learned queries, task by
task: `caption_queries` vectors for the decoder, and one for the contrastive loss, here on top of the first (the *cascade* of
section 3.2, "Attentional Poolers", which the paper found better than side by side).

    L_CoCa = λ_Con · L_Con + λ_Cap · L_Cap                                                    (equation 4)

The [CLS] token is the last of the text and sees all of it; as the paper masks it from the captioning loss, the captioner is
simply the decoder without it. Layers are those of ViT and GPT-2 (pre-norm), in the classes of transformers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gpt2.modeling_gpt2 import GPT2Block


class CoCaVisionConfig(ViTConfig):
    """A ViT; `caption_queries` vectors of an image go to the decoder, `projection_dim` is the width of the common space."""

    model_type = "coca_vision"

    caption_queries: int = 16
    projection_dim: int = 64


class CoCaTextConfig(GPT2Config):
    """GPT-2's sizes; the first `unimodal_layers` layers do not see the image. `cls_token_id` ends a text that is embedded."""

    model_type = "coca_text"

    unimodal_layers: int = 2
    projection_dim: int = 64
    cls_token_id: int = 0
    add_cross_attention: bool = True
    is_decoder: bool = True


class CoCaConfig(VisionEncoderDecoderConfig):
    """A CoCaVisionConfig (`encoder`), a CoCaTextConfig (`decoder`), and where the similarity's temperature begins."""

    model_type = "coca"

    logit_scale_init: float = 2.6593


class AttentionalPooler(nn.Module):
    """`queries` learned vectors attend to patches `[images, patches, hidden]` → `[images, queries, hidden]`."""

    def __init__(self, hidden: int, heads: int, queries: int, eps: float) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, hidden) * hidden**-0.5)
        self.heads = heads
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.q_proj, self.k_proj = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.v_proj, self.out_proj = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        batch, count, hidden = patches.shape
        read = self.norm(patches)
        query = self.q_proj(self.queries).view(1, -1, self.heads, hidden // self.heads).transpose(1, 2)
        key, value = (
            part(read).view(batch, count, self.heads, hidden // self.heads).transpose(1, 2) for part in (self.k_proj, self.v_proj)
        )
        weights = (query @ key.transpose(-1, -2) * (hidden // self.heads) ** -0.5).softmax(-1)
        return self.out_proj((weights @ value).transpose(1, 2).reshape(batch, -1, hidden))


class CoCaVisionModel(PreTrainedModel):
    """`last_hidden_state [images, caption_queries, hidden]`: what the decoder reads; `pooler_output`: the contrastive vector."""

    config_class = CoCaVisionConfig
    main_input_name = "pixel_values"
    base_model_prefix = "coca_vision"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: CoCaVisionConfig) -> None:
        super().__init__(config)
        hidden, heads, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.caption_pooler = AttentionalPooler(hidden, heads, config.caption_queries, eps)
        self.contrastive_pooler = AttentionalPooler(hidden, heads, 1, eps)
        self.projection = nn.Linear(hidden, config.projection_dim, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vit.get_input_embeddings()

    def contrast(self, queries: torch.Tensor) -> torch.Tensor:
        """The contrastive vector `[images, projection]`, not brought to unit length, of pooled vectors."""
        return self.projection(self.contrastive_pooler(queries)[:, 0])

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        queries = self.caption_pooler(self.vit(pixel_values).last_hidden_state)
        return BaseModelOutputWithPooling(last_hidden_state=queries, pooler_output=self.contrast(queries))


class UnimodalBlock(GPT2Block):
    """A layer that reads text alone, whatever image it is given."""

    def __init__(self, config: CoCaTextConfig, layer_idx: int | None = None) -> None:
        alone = copy.copy(config)
        alone.add_cross_attention = False
        super().__init__(alone, layer_idx=layer_idx)

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
        found: torch.Tensor = super().forward(hidden_states, past_key_values, attention_mask, use_cache=use_cache, **kwargs)
        return found


class CoCaForCausalLM(GPT2LMHeadModel):
    """The text decoder: unimodal layers, then multimodal ones."""

    config_class = CoCaTextConfig

    def __init__(self, config: CoCaTextConfig) -> None:
        super().__init__(config)
        blocks = [UnimodalBlock if i < config.unimodal_layers else GPT2Block for i in range(config.n_layer)]
        self.transformer.h = nn.ModuleList(block(config, layer_idx=i) for i, block in enumerate(blocks))
        self.cls_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.text_projection = nn.Linear(config.n_embd, config.projection_dim, bias=False)
        self.post_init()

    def embed_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The text's vector `[texts, projection]`, not brought to unit length: the state of [CLS] after the unimodal layers.

        `input_ids [texts, tokens]` end with `cls_token_id`; padding is on the right.
        """
        from transformers.masking_utils import create_causal_mask

        positions = torch.arange(input_ids.shape[1])[None]
        states = self.transformer.wte(input_ids) + self.transformer.wpe(positions)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=states, attention_mask=attention_mask, past_key_values=None, position_ids=positions
        )
        for block in self.transformer.h[: self.config.unimodal_layers]:
            states = block(states, attention_mask=mask)
        last = attention_mask.sum(-1) - 1
        return self.text_projection(self.cls_norm(states[torch.arange(states.shape[0]), last]))


@dataclass
class CoCaSimilarity:
    """Vectors as they leave the encoders (`[images or texts, projection]`), and `logits_per_image` [images, texts]."""

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    logits_per_image: torch.Tensor


class CoCaForConditionalGeneration(VisionEncoderDecoderModel):
    """Captions images (`generate(pixel_values)`) and compares them with texts (`similarity`)."""

    config_class = CoCaConfig

    def __init__(
        self, config: CoCaConfig, encoder: PreTrainedModel | None = None, decoder: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config, encoder, decoder)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init)))

    def get_image_features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """`pooler_output`: the images' contrastive vectors."""
        return self.encoder(pixel_values)

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> BaseModelOutputWithPooling:
        """`pooler_output`: the texts' contrastive vectors."""
        return BaseModelOutputWithPooling(pooler_output=self.decoder.embed_text(input_ids, attention_mask))

    def similarity(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> CoCaSimilarity:
        """σ_ij = exp(logit_scale) · xᵢ·yⱼ over unit vectors (equation 2)."""
        image = self.get_image_features(pixel_values).pooler_output
        text = self.get_text_features(input_ids, attention_mask).pooler_output
        unit = [each / each.norm(dim=-1, keepdim=True) for each in (image, text)]
        return CoCaSimilarity(image, text, self.logit_scale.exp() * unit[0] @ unit[1].T)


for _config, _auto, _model in (
    (CoCaVisionConfig, AutoModel, CoCaVisionModel),
    (CoCaTextConfig, AutoModelForCausalLM, CoCaForCausalLM),
    (CoCaConfig, AutoModelForImageTextToText, CoCaForConditionalGeneration),
):
    AutoConfig.register(_config.model_type, _config)
    _auto.register(_config, _model)
