"""Checkpoints of family `early_fusion`: Chameleon, CM3Leon, Janus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as t

from .common import HEADS, IMAGE, LAYERS, PATCH, TEMPLATE, TEXT, VOCABULARY, WIDTH, Parts, generating, tokenizer

CODES = 32
TOKENS = 16


def _code_word(number: int) -> str:
    """The name that a code has in Chameleon's vocabulary: its digits as letters."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(number)) + "Z"


def codes(config_class: Any, model_class: Any, begin: str, end: str, separator: str | None, **options: Any) -> Parts:
    """Chameleon's parts: 16 tokens of a codebook of 32 for an image, which stand in the vocabulary in no order."""
    order = [(number * 11 + 5) % CODES for number in range(CODES)]
    frame = {"boi_token": begin, "eoi_token": end}
    others = list(dict.fromkeys([begin, end, *([separator] if separator else [])]))
    words = tokenizer(["<image>", *others, *map(_code_word, order)], image_token="<image>", **frame)
    if separator:
        words.sep_token = separator
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    config = config_class(
        **text,
        vocabulary_map=words.get_vocab(),
        vq_config={
            "resolution": IMAGE,
            "num_embeddings": CODES,
            "embed_dim": 8,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
        },
        **options,
    )
    images = t.ChameleonImageProcessorPil(size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE})
    processor = {"processor_class": "ChameleonProcessor", "image_seq_length": TOKENS, "image_token": "<image>"}
    assert len(words) <= VOCABULARY
    return generating(model_class(config)), images, words, processor, None


def chameleon(**options: Any) -> Parts:
    return codes(t.ChameleonConfig, t.ChameleonForConditionalGeneration, "<racm3:break>", "<eoss>", "<reserved08706>", **options)


def cm3leon() -> Parts:
    """One token on both sides of an image, no separator."""
    from vlm_edge.zoo.cm3leon import BREAK, CM3LeonConfig, CM3LeonForConditionalGeneration

    return codes(CM3LeonConfig, CM3LeonForConditionalGeneration, BREAK, BREAK, None)


def janus() -> Parts:
    """Janus: reads images through a vision encoder, writes them in 16 codes of a codebook of its own."""
    words = tokenizer(
        ["<image_placeholder>", "<begin_of_image>", "<end_of_image>"],
        image_token="<image_placeholder>",
        boi_token="<begin_of_image>",
        eoi_token="<end_of_image>",
    )
    vision = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": IMAGE,
        "patch_size": PATCH,
        "mlp_ratio": 2.0,
        "projection_dim": WIDTH,
        "num_image_tokens": TOKENS,
    }
    codebook = {
        "embed_dim": 8,
        "num_embeddings": 2 * CODES,
        "latent_channels": 16,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "projection_dim": WIDTH,
        "image_token_embed_dim": WIDTH,
    }
    config = t.JanusConfig(
        text_config=t.LlamaConfig(**TEXT, tie_word_embeddings=True),
        vision_config=vision,
        vq_config=codebook,
        image_token_id=words.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=True,
    )
    images = t.JanusImageProcessorPil(size={"height": IMAGE, "width": IMAGE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model = generating(t.JanusForConditionalGeneration(config))
    model.generation_config.guidance_scale = 5.0
    model.generation_config.generation_kwargs = {"boi_token_id": words.convert_tokens_to_ids("<begin_of_image>")}
    processor = {"processor_class": "JanusProcessor", "num_image_tokens": TOKENS}
    return model, images, words, processor, TEMPLATE.replace("IMAGE", "'<image_placeholder>\n'")


CHECKPOINTS: dict[str, Callable[[], Parts]] = {
    "chameleon": chameleon,
    "chameleon-swin": lambda: chameleon(swin_norm=True),
    "cm3leon": cm3leon,
    "janus": janus,
}
