"""Checkpoints of family `projector` that cut an image into tiles: LLaVA-NeXT, LLaVA-OneVision, InternVL."""

from __future__ import annotations

from collections.abc import Callable

import transformers as t

from .common import (
    HEADS,
    IMAGE,
    LAYERS,
    MLP,
    PATCH,
    TEMPLATE,
    TEXT,
    VISION,
    WIDTH,
    WINDOW,
    Parts,
    generating,
    text_config,
    tokenizer,
)

PINPOINTS = [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE], [2 * IMAGE, 2 * IMAGE], [IMAGE, 3 * IMAGE], [3 * IMAGE, IMAGE]]
CONTEXT = 512
"""Five tiles of 16 tokens, twice."""


def text(kind: str) -> t.PreTrainedConfig:
    """A decoder with room for many tiles."""
    config = text_config(kind)
    config.max_position_embeddings = CONTEXT
    return config


def llava_next(kind: str, tower: str = "clip", layer: int | list[int] = -2) -> Parts:
    """LLaVA-NeXT: tiles of 32 in one of five arrangements, and the whole image."""
    words = tokenizer(["<image>"], image_token="<image>")
    decoder = text(kind)
    clip = tower == "clip"
    strategy = "default" if clip else "full"
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**VISION) if clip else t.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=decoder,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=(IMAGE // PATCH) ** 2,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=decoder.tie_word_embeddings,
    )
    images = t.LlavaNextImageProcessorPil(
        size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE}, image_grid_pinpoints=PINPOINTS
    )
    processor = {
        "processor_class": "LlavaNextProcessor",
        "patch_size": PATCH,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": 1 if clip else 0,
        "image_token": "<image>",
    }
    model = generating(t.LlavaNextForConditionalGeneration(config))
    return model, images, words, processor, TEMPLATE.replace("IMAGE", "'<image>\n'")


def llava_onevision() -> Parts:
    """LLaVA-OneVision: up to 3 × 3 tiles, whose features are made fewer beyond four tiles; videos of pooled frames."""
    pinpoints = [[rows * IMAGE, columns * IMAGE] for rows in range(1, 4) for columns in range(1, 4)]
    words = tokenizer(["<image>", "<video>"], image_token="<image>", video_token="<video>")
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text("qwen2"),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        tie_word_embeddings=True,
    )
    images = t.LlavaOnevisionImageProcessorPil(size={"height": IMAGE, "width": IMAGE}, image_grid_pinpoints=pinpoints)
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": (IMAGE // PATCH) ** 2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_2",
        "image_token": "<image>",
        "video_token": "<video>",
        "video_processor": {
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            "size": {"height": IMAGE, "width": IMAGE},
            "do_sample_frames": True,
            "num_frames": 3,
        },
    }
    model = generating(t.LlavaOnevisionForConditionalGeneration(config))
    return model, images, words, processor, TEMPLATE.replace("IMAGE", "'<image>\n'")


def internvl(kind: str = "qwen2") -> Parts:
    """InternVL: up to 4 tiles and the whole image, each 4 tokens after the pixel shuffle."""
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer(list(names.values()), **names)
    decoder = text(kind)
    config = t.InternVLConfig(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "image_size": [IMAGE, IMAGE],
            "patch_size": [PATCH, PATCH],
        },
        text_config=decoder,
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(IMAGE // PATCH) ** 2 // 4,
        downsample_ratio=0.5,
        tie_word_embeddings=decoder.tie_word_embeddings,
    )
    images = t.GotOcr2ImageProcessorPil(size={"height": IMAGE, "width": IMAGE}, min_patches=1, max_patches=4)
    processor = {
        "processor_class": "InternVLProcessor",
        "image_seq_length": (IMAGE // PATCH) ** 2 // 4,
        "video_processor": {"video_processor_type": "InternVLVideoProcessor", "size": {"height": IMAGE, "width": IMAGE}},
    }
    model = generating(t.InternVLForConditionalGeneration(config))
    return model, images, words, processor, TEMPLATE.replace("IMAGE", "'<IMG_CONTEXT>\n'")


SHUFFLED = (IMAGE // PATCH) ** 2 // 4
"""Tokens of a tile after a pixel shuffle by two."""


def cohere2() -> t.PreTrainedConfig:
    """A decoder with attention and feed-forward side by side; its full layers have no positions."""
    layers = ["sliding_attention", "full_attention"]
    sizes = {**TEXT, "max_position_embeddings": CONTEXT}
    return t.Cohere2Config(**sizes, layer_types=layers, sliding_window=WINDOW, logit_scale=0.25, tie_word_embeddings=True)


def aya_vision() -> Parts:
    """Aya Vision: up to 4 tiles, each after its number, and the whole image."""
    words = tokenizer(["<image>", "<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>"], image_token="<image>")
    config = t.AyaVisionConfig(
        vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=cohere2(),
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
        alignment_intermediate_size=2 * MLP,
    )
    images = t.GotOcr2ImageProcessorPil(size={"height": IMAGE, "width": IMAGE}, min_patches=1, max_patches=4)
    processor = {"processor_class": "AyaVisionProcessor", "patch_size": PATCH, "img_size": IMAGE, "downsample_factor": 2}
    model = generating(t.AyaVisionForConditionalGeneration(config))
    return model, images, words, processor, TEMPLATE.replace("IMAGE", "'<image>'")


def cohere2_vision() -> Parts:
    """Command A Vision: up to 4 tiles and the whole image, each with a token that ends it."""
    names = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>", "img_line_break_token": "<line>"}
    words = tokenizer(list(names.values()), **names)
    config = t.Cohere2VisionConfig(
        vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=cohere2(),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        alignment_intermediate_size=2 * MLP,
    )
    side = {"height": IMAGE, "width": IMAGE}
    # Its own processor needs torchvision to be made; what it would save is this.
    images = t.GotOcr2ImageProcessorPil(size=side, crop_to_patches=True, max_patches=4)
    processor = {
        "processor_class": "Cohere2VisionProcessor",
        "image_processor": {
            "image_processor_type": "Cohere2VisionImageProcessor",
            "size": side,
            "resample": 3,
            "crop_to_patches": True,
            "max_patches": 4,
            "patch_size": PATCH,
        },
    }
    model = generating(t.Cohere2VisionForConditionalGeneration(config))
    return model, images, words, processor, TEMPLATE.replace("IMAGE", "'<image>'")


CHECKPOINTS: dict[str, Callable[[], Parts]] = {
    "llava_next": lambda: llava_next("mistral"),
    "llava_next-siglip": lambda: llava_next("llama", "siglip", [-2, -1]),
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "internvl-qwen3": lambda: internvl("qwen3"),
    "aya_vision": aya_vision,
    "cohere2_vision": cohere2_vision,
}
