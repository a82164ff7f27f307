"""Checkpoints of family `qformer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as t

from .common import HEADS, IMAGE, LAYERS, MLP, VISION, VOCABULARY, WIDTH, Parts, generating, text_config, tokenizer

QUERIES, FRAMES = 5, 4
SMALL = 48
"""Width of encoder and Q-Former: unlike that of the language model."""
INSTRUCTION_LENGTH = 64
AUDIO = 24
"""Width of the audio features that come in."""

_QFORMER: dict[str, Any] = {
    "hidden_size": SMALL,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": MLP,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": INSTRUCTION_LENGTH,
    "pad_token_id": 1,
}
_KINDS = {
    "blip2": (t.Blip2Config, t.Blip2ForConditionalGeneration),
    "instructblip": (t.InstructBlipConfig, t.InstructBlipForConditionalGeneration),
    "instructblipvideo": (t.InstructBlipVideoConfig, t.InstructBlipVideoForConditionalGeneration),
}


class VideoProcessorFile:
    """Saves a video processor's options as transformers does; its class wants torchvision."""

    def save_pretrained(self, folder: Any) -> None:
        (folder / "video_preprocessor_config.json").write_text(
            t.BlipImageProcessorPil(size={"height": IMAGE, "width": IMAGE})
            .to_json_string()
            .replace('"image_processor_type": "BlipImageProcessor"', '"video_processor_type": "InstructBlipVideoVideoProcessor"')
        )


def text(kind: str) -> t.PreTrainedConfig:
    """A language model; `t5` reads the features in its encoder."""
    if not kind.startswith("t5"):
        return text_config(kind)
    return t.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=16,
        d_ff=MLP,
        num_layers=LAYERS,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu" if kind == "t5-gated" else "relu",
        tie_word_embeddings=kind != "t5-gated",
        pad_token_id=1,
        eos_token_id=3,
        decoder_start_token_id=1,
    )


def instruction_tokenizer() -> t.PreTrainedTokenizerFast:
    """Another than the language model's: its ids are shifted by a special token, and it ends texts."""
    return tokenizer(["[DEC]"], ends=True)


def blip(kind: str, language: str, *, every: int = 2) -> Parts:
    """BLIP-2 or its descendants. `every`: the Q-Former looks at the image in every so many layers."""
    name = "video" if kind == "instructblipvideo" else "image"
    t5 = language.startswith("t5")
    words = tokenizer([f"<{name}>"], ends=t5)  # not as `image_token`: the processors expect an object there, and find its text
    config_class, model_class = _KINDS[kind]
    config = config_class(
        vision_config={**VISION, "hidden_size": SMALL, "num_attention_heads": 3, "qkv_bias": every != 1},
        qformer_config={**_QFORMER, "cross_attention_frequency": every},
        text_config=text(language).to_dict(),
        num_query_tokens=QUERIES,
        **{f"{name}_token_index": words.convert_tokens_to_ids(f"<{name}>")},
    )
    model = generating(model_class(config))
    processor = {"processor_class": f"{model_class.__name__.removesuffix('ForConditionalGeneration')}Processor"}
    processor |= {"num_query_tokens": QUERIES}
    images = VideoProcessorFile() if name == "video" else t.BlipImageProcessorPil(size={"height": IMAGE, "width": IMAGE})
    more = {} if kind == "blip2" else {"qformer_tokenizer": instruction_tokenizer()}
    return model, images, words, processor, None, more


def x_instructblip(language: str = "llama") -> Parts:
    """Images and audio, a Q-Former each; the two differ in width, depth and how often they look at their encoder."""
    from vlm_edge.zoo.x_instructblip import XInstructBlipConfig, XInstructBlipForConditionalGeneration

    words = tokenizer(["<image>", "<audio>"], image_token="<image>", audio_token="<audio>")
    config = XInstructBlipConfig(
        image_config={**VISION, "hidden_size": SMALL, "num_attention_heads": 3},
        audio_config={
            "feature_size": AUDIO,
            "hidden_size": 32,
            "intermediate_size": MLP,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        image_qformer_config=_QFORMER,
        audio_qformer_config={
            **_QFORMER,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "cross_attention_frequency": 1,
        },
        text_config=text(language).to_dict(),
        num_query_tokens=QUERIES,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        audio_token_id=words.convert_tokens_to_ids("<audio>"),
    )
    model = generating(XInstructBlipForConditionalGeneration(config))
    images = t.BlipImageProcessorPil(size={"height": IMAGE, "width": IMAGE})
    processor = {"processor_class": "XInstructBlipProcessor", "num_query_tokens": QUERIES}
    return model, images, words, processor, None, {"qformer_tokenizer": instruction_tokenizer()}


CHECKPOINTS: dict[str, Callable[[], Parts]] = {
    "blip2-opt": lambda: blip("blip2", "opt"),
    "blip2-gpt2": lambda: blip("blip2", "gpt2", every=1),
    "blip2-qwen2": lambda: blip("blip2", "qwen2", every=3),
    "minigpt4": lambda: blip("blip2", "llama"),
    "blip2-t5": lambda: blip("blip2", "t5"),
    "instructblip-llama": lambda: blip("instructblip", "llama"),
    "instructblip-opt": lambda: blip("instructblip", "opt", every=1),
    "instructblip-t5": lambda: blip("instructblip", "t5-gated"),
    "x_instructblip": x_instructblip,
    "instructblipvideo": lambda: blip("instructblipvideo", "llama"),
}
