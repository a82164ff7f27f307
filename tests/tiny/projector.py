"""Checkpoints of family `projector`."""

from __future__ import annotations

from collections.abc import Callable

import transformers as t

from .common import (
    HEADS,
    IMAGE,
    LAYERS,
    PATCH,
    TEMPLATE,
    TEXT,
    VISION,
    WIDTH,
    Parts,
    clip_images,
    generating,
    siglip_images,
    text_config,
    tokenizer,
)


def llava(text: str, *, tower: str = "clip", layer: int | list[int] = -2, strategy: str = "default") -> Parts:
    """LLaVA around any text model; `tower` is `clip` (with a class token) or `siglip` (without)."""
    words = tokenizer(["<image>"], image_token="<image>")
    vision = t.CLIPVisionConfig(**VISION) if tower == "clip" else t.SiglipVisionConfig(**VISION, vision_use_head=False)
    decoder = text_config(text)
    config = t.LlavaConfig(
        vision_config=vision,
        text_config=decoder,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE // PATCH) ** 2,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=decoder.tie_word_embeddings,
    )
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": PATCH,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": 1 if tower == "clip" else 0,
        "image_token": "<image>",
    }
    model = generating(t.LlavaForConditionalGeneration(config))
    images = clip_images() if tower == "clip" else siglip_images()
    return model, images, words, processor, TEMPLATE.replace("IMAGE", "'<image>\n'")


def vipllava() -> Parts:
    """VipLLaVA: LLaVA over several layers of its vision encoder, with a norm before the projector."""
    _, images, words, processor, template = llava("llama")
    config = t.VipLlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=text_config("llama"),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE // PATCH) ** 2,
        vision_feature_layers=[-2, -1],
        tie_word_embeddings=True,
    )
    return generating(t.VipLlavaForConditionalGeneration(config)), images, words, processor, template


def tiles(kind: str) -> Parts:
    """SmolVLM or Idefics3: an image of up to 2 × 2 tiles and a global view, each 4 tokens after the pixel shuffle."""
    names = {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>", "global_image_token": "<global-img>"}
    markers = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    words = tokenizer([*names.values(), "<end_of_utterance>", *markers], **names)
    smol = kind == "smolvlm"
    config = (t.SmolVLMConfig if smol else t.Idefics3Config)(
        vision_config={"model_type": "smolvlm_vision" if smol else "idefics3_vision", **VISION},
        text_config=t.LlamaConfig(**TEXT, tie_word_embeddings=not smol),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=not smol,
        pad_token_id=1,
    )
    images = (t.SmolVLMImageProcessorPil if smol else t.Idefics3ImageProcessorPil)(
        size={"longest_edge": 2 * IMAGE}, max_image_size={"longest_edge": IMAGE}, do_image_splitting=True
    )
    end = words.convert_tokens_to_ids("<end_of_utterance>")
    model = generating((t.SmolVLMForConditionalGeneration if smol else t.Idefics3ForConditionalGeneration)(config), [3, end])
    processor = {"processor_class": "Idefics3Processor", "image_seq_len": (IMAGE // PATCH) ** 2 // 4}
    return model, images, words, processor, TEMPLATE.replace("IMAGE", "'<image>'")


def qwen2_vl() -> Parts:
    """Qwen2-VL: images of any size in patches of 8, merged 2 × 2, M-RoPE over time, height and width."""
    words = tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"], image_token="<|image_pad|>")
    token = words.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    config = t.Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope, "tie_word_embeddings": True},
        vision_config={
            "depth": LAYERS,
            "embed_dim": WIDTH,
            "hidden_size": WIDTH,
            "num_heads": HEADS,
            "mlp_ratio": 2,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    images = t.Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )
    model = generating(t.Qwen2VLForConditionalGeneration(config))
    return model, images, words, None, TEMPLATE.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'")


CHECKPOINTS: dict[str, Callable[[], Parts]] = {
    "llava-llama": lambda: llava("llama"),
    "llava-opt": lambda: llava("opt", tower="siglip", layer=-1, strategy="full"),
    "llava-gpt2": lambda: llava("gpt2", strategy="full"),
    "llava-qwen2": lambda: llava("qwen2", layer=[-2, -1]),
    "llava-qwen3": lambda: llava("qwen3"),
    "llava-phi3": lambda: llava("phi3"),
    "llava-mistral": lambda: llava("mistral"),
    "llava-gemma": lambda: llava("gemma"),
    "llava-gemma2": lambda: llava("gemma2"),
    "llava-gemma3": lambda: llava("gemma3"),
    "vipllava": vipllava,
    "smolvlm": lambda: tiles("smolvlm"),
    "idefics3": lambda: tiles("idefics3"),
    "qwen2_vl": qwen2_vl,
}
