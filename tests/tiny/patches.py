"""Checkpoints of family `projector` that take images as a row of patches: Qwen2.5-VL, Qwen3-VL, Pixtral, Mistral 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as t

from .common import HEADS, LAYERS, MLP, PATCH, TEMPLATE, TEXT, WIDTH, Parts, generating, text_config, tokenizer

QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_heads": HEADS,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "out_hidden_size": WIDTH,
}


def _qwen(config_class: Any, model_class: Any, vision: dict[str, Any], rope: dict[str, Any], **more: Any) -> Parts:
    words = tokenizer(QWEN_TOKENS, image_token="<|image_pad|>", video_token="<|video_pad|>")
    token = words.convert_tokens_to_ids
    config = config_class(
        text_config={**TEXT, **more, "rope_parameters": rope, "max_position_embeddings": 512, "tie_word_embeddings": True},
        vision_config={**QWEN_VISION, **vision},
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    images = t.Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 96 * 96}
    )
    model = generating(model_class(config))
    kind = "Qwen3VLVideoProcessor" if "deepstack_visual_indexes" in vision else "Qwen2VLVideoProcessor"
    sizes = {"patch_size": PATCH, "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}}
    processor = {"video_processor": {"video_processor_type": kind, **sizes}}
    return model, images, words, processor, TEMPLATE.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'")


def qwen2_5_vl() -> Parts:
    """Qwen2.5-VL: windows of 2 × 2 tokens in two of three layers."""
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"window_size": 4 * PATCH, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    return _qwen(t.Qwen2_5_VLConfig, t.Qwen2_5_VLForConditionalGeneration, vision, rope)


def qwen3_vl() -> Parts:
    """Qwen3-VL: a square of 5 × 5 learned positions, features of two early layers added in the decoder."""
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 10000.0}
    vision = {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1]}
    return _qwen(t.Qwen3VLConfig, t.Qwen3VLForConditionalGeneration, vision, rope, num_hidden_layers=3)


def _pixtral_vision() -> t.PixtralVisionConfig:
    return t.PixtralVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=12 * PATCH,
        patch_size=PATCH,
    )


def _rows(config: Any, model_class: Any, words: Any, merge: int) -> Parts:
    images = t.PixtralImageProcessorPil(size={"longest_edge": 12 * PATCH}, patch_size={"height": PATCH, "width": PATCH})
    processor = {
        "processor_class": "PixtralProcessor",
        "patch_size": PATCH,
        "spatial_merge_size": merge,
        "image_token": "[IMG]",
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
    }
    return generating(model_class(config)), images, words, processor, TEMPLATE.replace("IMAGE", "'[IMG]'")


def pixtral() -> Parts:
    """The first Pixtral: LLaVA's class with Pixtral's vision encoder."""
    words = tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], image_token="[IMG]")
    text = text_config("mistral")
    text.max_position_embeddings = 512
    config = t.LlavaConfig(
        vision_config=_pixtral_vision(),
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return _rows(config, t.LlavaForConditionalGeneration, words, 1)


def mistral3() -> Parts:
    """Mistral 3: 2 × 2 patches become one token."""
    words = tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], image_token="[IMG]")
    text = text_config("mistral")
    text.max_position_embeddings, text.sliding_window = 512, None
    config = t.Mistral3Config(
        vision_config=_pixtral_vision(),
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return _rows(config, t.Mistral3ForConditionalGeneration, words, 2)


def lighton_ocr() -> Parts:
    """LightOnOCR: Pixtral's encoder and Mistral 3's merger before a Qwen 3, with no rows in the prompt."""
    words = tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], image_token="[IMG]")
    text = text_config("qwen3")
    text.max_position_embeddings = 512
    config = t.LightOnOcrConfig(
        vision_config=_pixtral_vision(),
        text_config=text,
        image_token_id=words.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return _rows(config, t.LightOnOcrForConditionalGeneration, words, 2)


CHECKPOINTS: dict[str, Callable[[], Parts]] = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "pixtral": pixtral,
    "mistral3": mistral3,
    "lighton_ocr": lighton_ocr,
}
