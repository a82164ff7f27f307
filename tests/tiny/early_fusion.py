"""Checkpoints of family `early_fusion`: Chameleon, CM3Leon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as t

from .common import IMAGE, TEXT, VOCABULARY, Parts, generating, tokenizer

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


CHECKPOINTS: dict[str, Callable[[], Parts]] = {
    "chameleon": chameleon,
    "chameleon-swin": lambda: chameleon(swin_norm=True),
    "cm3leon": cm3leon,
}
