"""Checkpoints whose decoder sees some tokens in both directions: family `prefix_lm`, and Gemma 3 of `projector`."""

from __future__ import annotations

from collections.abc import Callable

import transformers as t

from .common import (
    CONTEXT,
    HEADS,
    IMAGE,
    LAYERS,
    MLP,
    PATCH,
    VISION,
    VOCABULARY,
    WIDTH,
    WINDOW,
    Parts,
    clip_images,
    generating,
    siglip_images,
    text_config,
    tokenizer,
)

GEMMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma3(*, window: int = WINDOW, crops: bool = False) -> Parts:
    """Gemma 3: four tokens an image; `crops` cuts longish pictures up (pan and scan)."""
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = tokenizer([*names.values(), "<start_of_turn>", "<end_of_turn>"], **names)
    token = words.convert_tokens_to_ids
    text = text_config("gemma3")
    text.sliding_window, text.tie_word_embeddings = window, False
    config = t.Gemma3Config(
        vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text,
        mm_tokens_per_image=4,
        boi_token_index=token("<start_of_image>"),
        eoi_token_index=token("<end_of_image>"),
        image_token_index=token("<image_soft_token>"),
        tie_word_embeddings=False,  # or every token would be followed by itself
    )
    images = t.Gemma3ImageProcessorPil(
        size={"height": IMAGE, "width": IMAGE},
        do_pan_and_scan=crops,
        pan_and_scan_min_crop_size=16,
        pan_and_scan_max_num_crops=3,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    model = generating(t.Gemma3ForConditionalGeneration(config), [3, token("<end_of_turn>")])
    return model, images, words, processor, GEMMA3_TEMPLATE


def paligemma(text: str) -> Parts:
    """PaliGemma (`gemma`) and PaliGemma 2 (`gemma2`, which has sliding layers)."""
    words = tokenizer(["<image>"], image_token="<image>")
    vision, decoder = t.SiglipVisionConfig(**VISION, vision_use_head=False), text_config(text)
    decoder.tie_word_embeddings = False
    config = t.PaliGemmaConfig(
        vision_config=vision,
        text_config=decoder,
        tie_word_embeddings=False,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    images = siglip_images()
    images.image_seq_length = (IMAGE // PATCH) ** 2
    processor = {"processor_class": "PaliGemmaProcessor"}
    return generating(t.PaliGemmaForConditionalGeneration(config)), images, words, processor, None


def git() -> Parts:
    """GIT: CLIP's encoder with its class token before a BERT-like decoder; `<s>` is [CLS] and `</s>` is [SEP]."""
    words = tokenizer([], ends=True)
    words.cls_token, words.sep_token = "<s>", "</s>"
    config = t.GitConfig(
        vision_config=VISION,
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        layer_norm_eps=1e-6,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
    )
    return generating(t.GitForCausalLM(config)), clip_images(), words, {"processor_class": "GitProcessor"}, None


def simvlm() -> Parts:
    """SimVLM (zoo): two convolution steps less than the default, so that 32 pixels are 16 patches."""
    from vlm_edge.zoo.simvlm import SimVLMConfig, SimVLMForConditionalGeneration

    words = tokenizer(["<image>"], image_token="<image>")
    config = SimVLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        image_size=IMAGE,
        stem_stride=2,
        conv_channels=[16, 32, 32],
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
    )
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": PATCH,
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": 0,
        "image_token": "<image>",
    }
    return generating(SimVLMForConditionalGeneration(config)), siglip_images(), words, processor, None


CHECKPOINTS: dict[str, Callable[[], Parts]] = {
    "gemma3": gemma3,
    "gemma3-crops": lambda: gemma3(crops=True),
    "gemma3-narrow": lambda: gemma3(window=3),
    "git": git,
    "simvlm": simvlm,
    "paligemma": lambda: paligemma("gemma"),
    "paligemma2": lambda: paligemma("gemma2"),
}
