"""Checkpoints of the zoo's captioners: VisualGPT, CoCa, Show-Attend-Tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as t

from vlm_edge.zoo.coca import CoCaConfig, CoCaForConditionalGeneration, CoCaTextConfig, CoCaVisionConfig
from vlm_edge.zoo.show_attend_tell import ShowAttendTellConfig, ShowAttendTellForConditionalGeneration
from vlm_edge.zoo.visual_gpt import VisualGPTConfig, VisualGPTForConditionalGeneration, VisualGPTTextConfig

from .common import CONTEXT, HEADS, IMAGE, LAYERS, VISION, VOCABULARY, WIDTH, Parts, generating, tokenizer

START = 2
"""What captions begin with: `<s>`."""
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": CONTEXT,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "bos_token_id": START,
    "eos_token_id": 3,
}


def _images() -> t.ViTImageProcessorPil:
    return t.ViTImageProcessorPil(size={"height": IMAGE, "width": IMAGE})


def visual_gpt() -> Parts:
    """VisualGPT: a ViT, and a GPT-2 whose cross-attention is gated."""
    config = VisualGPTConfig.from_encoder_decoder_configs(t.ViTConfig(**VISION), VisualGPTTextConfig(**_GPT2))
    return _starting(VisualGPTForConditionalGeneration(config)), _images(), tokenizer([]), None, None


def coca() -> Parts:
    """CoCa: two unimodal layers and two multimodal ones, five caption queries, vectors of 32."""
    words = tokenizer(["[CLS]"])
    vision = CoCaVisionConfig(**VISION, caption_queries=5, projection_dim=32)
    sizes = {**_GPT2, "n_layer": 2 * LAYERS, "unimodal_layers": LAYERS, "projection_dim": 32}
    text = CoCaTextConfig(**sizes, cls_token_id=words.convert_tokens_to_ids("[CLS]"))
    model = CoCaForConditionalGeneration(CoCaConfig.from_encoder_decoder_configs(vision, text))
    return _starting(model), _images(), words, None, None


def show_attend_tell() -> Parts:
    """Show-Attend-Tell: 8 × 8 places of an image, an LSTM."""
    config = ShowAttendTellConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        attention_dim=48,
        image_size=IMAGE,
        conv_channels=[16, 24, 32],
        max_position_embeddings=CONTEXT,
        pad_token_id=1,
        bos_token_id=START,
        eos_token_id=3,
    )
    return _starting(ShowAttendTellForConditionalGeneration(config)), _images(), tokenizer([]), None, None


def _starting(model: t.PreTrainedModel) -> t.PreTrainedModel:
    generating(model).generation_config.decoder_start_token_id = START
    if hasattr(model.config, "decoder"):
        model.config.decoder_start_token_id = START
    return model


CHECKPOINTS: dict[str, Callable[[], Parts]] = {
    "visual_gpt": visual_gpt,
    "coca": coca,
    "show_attend_tell": show_attend_tell,
}
