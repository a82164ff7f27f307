"""Zoo checkpoints of family `projector`: MiniGPT-v2, Frozen, PaLM-E."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as t

from .common import IMAGE, TEMPLATE, VISION, VOCABULARY, Parts, clip_images, generating, siglip_images, text_config, tokenizer

BINS, LOW, HIGH = 16, [-1.0, 0.0, -0.5], [1.0, 2.0, 0.5]


def minigpt_v2() -> Parts:
    """MiniGPT-v2: 16 patches, four neighbours of which become one token of a Llama."""
    from vlm_edge.zoo.minigpt_v2 import TASKS, MiniGPTv2Config, MiniGPTv2ForConditionalGeneration

    words = tokenizer(["<ImageHere>", *TASKS], image_token="<ImageHere>")
    config = MiniGPTv2Config(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=text_config("llama"),
        image_token_id=words.convert_tokens_to_ids("<ImageHere>"),
        vision_feature_layer=-2,
        tie_word_embeddings=True,
    )
    template = TEMPLATE.replace("IMAGE", "'<Img><ImageHere></Img>'")
    return generating(MiniGPTv2ForConditionalGeneration(config)), clip_images(), words, None, template


def frozen(kind: str = "opt") -> Parts:
    """Frozen: two tokens out of a normaliser-free ResNet before a language model."""
    from vlm_edge.zoo.frozen import FrozenConfig, FrozenForConditionalGeneration

    words = tokenizer(["<image>"], image_token="<image>")
    text = text_config(kind)
    config = FrozenConfig(
        text_config=text,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_size=IMAGE,
        channels=[16, 24, 32],
        depth=2,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    template = TEMPLATE.replace("IMAGE", "'<image>'")
    return generating(FrozenForConditionalGeneration(config)), siglip_images(), words, None, template


def palm_e() -> Parts:
    """PaLM-E: images and states of 6 numbers in the sentence, actions of three dimensions in the last 16 tokens."""
    from vlm_edge.zoo.palm_e import PaLMEConfig, PaLMEForConditionalGeneration

    words = tokenizer(["<image>", "<state>"], image_token="<image>", state_token="<state>")
    actions: dict[str, Any] = {"first_token": VOCABULARY - BINS, "bins": BINS, "low": LOW, "high": HIGH}
    config = PaLMEConfig(
        vision_config=t.ViTConfig(**VISION),
        text_config=text_config("llama"),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        state_token_id=words.convert_tokens_to_ids("<state>"),
        state_size=6,
        state_hidden_size=24,
        action_tokens=actions,
        tie_word_embeddings=True,
    )
    template = TEMPLATE.replace("{{ IMAGE }}", "{{ '<image>' }}{% elif part['type'] == 'state' %}{{ '<state>' }}")
    return generating(PaLMEForConditionalGeneration(config)), siglip_images(), words, None, template


CHECKPOINTS: dict[str, Callable[[], Parts]] = {"minigpt_v2": minigpt_v2, "frozen": frozen, "palm_e": palm_e}
