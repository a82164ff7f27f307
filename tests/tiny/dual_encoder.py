"""Checkpoints of family `dual_encoder`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as t

from .common import TEXT, VISION, WIDTH, Parts, clip_images, siglip_images, tokenizer


def clip() -> Parts:
    """CLIP with a space of 32 dimensions."""
    words = tokenizer([], ends=True)
    text = {key: TEXT[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    layers = {key: VISION[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    config = t.CLIPConfig(text_config={**text, **layers, "max_position_embeddings": 16}, vision_config=VISION, projection_dim=32)
    return t.CLIPModel(config), clip_images(), words, {"processor_class": "CLIPProcessor"}, None


def siglip() -> Parts:
    """SigLIP: no class token, pooling by attention, a scale and a bias."""
    words = tokenizer([], ends=True)
    text = {key: TEXT[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    layers = {key: VISION[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    config = t.SiglipConfig(
        text_config={**text, **layers, "max_position_embeddings": 16, "projection_size": WIDTH}, vision_config=VISION
    )
    model = t.SiglipModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    return model, siglip_images(), words, {"processor_class": "SiglipProcessor"}, None


CHECKPOINTS: dict[str, Callable[[], Parts]] = {
    "clip": clip,
    "siglip": siglip,
}
