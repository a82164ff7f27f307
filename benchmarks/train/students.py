"""Small models of the other fusion families, trained on the same scenes by one plain recipe: one question and answer per row.

A student says how its class is built, what stands before the answer, and how it is called; the loop is `teach.py`. Widths are
multiples of 32 (block-32 quantisation) and every head is 32 wide, as in models.py.
"""

# mypy: disallow-untyped-calls=false
# (transformers leaves most of its constructors untyped)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers as t
from tokenizers import processors
from torch import Tensor

from benchmarks.train import tokenizer as tokenizers
from benchmarks.train.models import HEADS, MLP, PATCH, TILE, WIDTH, Parts

CELLS = (TILE // PATCH) ** 2
FENCE = "<fake_token_around_image>"


@dataclass(frozen=True, slots=True)
class Student:
    """One class to train.

    `build(seed)` makes model and processor. `before(ids, tokenizer, question)` are the tokens before the answer, `ids` being the
    tokenizer without special tokens. `call(tensors)` turns a batch (input_ids, attention_mask, pixel_values, prefix) into the
    model's arguments, `prefix` being true where a token stands before the answer. `seen` names the part of the model whose output
    shows the image's cells in order, one token for each; a linear probe on it helps the eyes along. `inputs` calls the
    checkpoint's own processor, as a user would.
    """

    build: Callable[[int], Parts]
    before: Callable[[Callable[[str], list[int]], Any, str], list[int]]
    call: Callable[[dict[str, Tensor]], dict[str, Any]]
    seen: str
    inputs: Callable[[Any, list[Any], list[str]], Any]
    steps: int = 3000
    batch: int = 24
    talks: int = 3
    rate: float = 1e-3


def _words(seed: int, special: list[str], **named: str) -> Any:
    """A byte-level BPE on the scenes' corpus; `<s>` begins a text."""
    bare = tokenizers._byte_level(["<unk>", "<s>", "</s>", "<pad>", *special], seed)
    bare.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return t.PreTrainedTokenizerFast(
        tokenizer_object=bare,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=named,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


def _generation() -> t.GenerationConfig:
    return t.GenerationConfig(**_IDS, do_sample=False, max_new_tokens=24)


_VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "image_size": TILE,
    "patch_size": PATCH,
}
_TEXT: dict[str, Any] = {
    "vocab_size": tokenizers.VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 512,
    **_IDS,
}


def paligemma(seed: int) -> Parts:
    """PaliGemma (arXiv 2407.07726): SigLIP, a linear projection, Gemma with a bidirectional prefix."""
    words = _words(seed, ["<image>"], image_token="<image>")
    config = t.PaliGemmaConfig(
        vision_config=t.SiglipVisionConfig(**_VISION, vision_use_head=False),
        text_config=t.GemmaConfig(**_TEXT, num_key_value_heads=1, head_dim=WIDTH // HEADS),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    images = t.SiglipImageProcessorPil(size={"height": TILE, "width": TILE})
    images.image_seq_length = CELLS
    return Parts(t.PaliGemmaForConditionalGeneration(config), t.PaliGemmaProcessor(images, words), _generation())


def idefics(seed: int) -> Parts:
    """IDEFICS, the open Flamingo (arXiv 2204.14198): CLIP's encoder, a perceiver to 16 latents, gated cross-attention."""
    words = _words(seed, [FENCE, "<image>"], image_token="<image>")
    config = t.IdeficsConfig(
        **{**_TEXT, "vocab_size": tokenizers.VOCABULARY - 32},
        additional_vocab_size=32,
        alpha_initializer="ones",
        alpha_type="vector",
        cross_layer_interval=2,
        qk_layer_norms=True,
        freeze_text_layers=False,
        freeze_vision_layers=False,
        tie_word_embeddings=False,
        use_resampler=True,
        vision_config={**{key: value for key, value in _VISION.items() if key != "hidden_size"}, "embed_dim": WIDTH},
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": CELLS,
            "resampler_depth": 2,
            "resampler_n_heads": HEADS,
            "resampler_head_dim": WIDTH // HEADS,
            "qk_layer_norms_perceiver": True,
        },
    )
    images = t.IdeficsImageProcessorPil(image_size=TILE)
    return Parts(t.IdeficsForVisionText2Text(config), t.IdeficsProcessor(images, words, image_size=TILE), _generation())


def blip2(seed: int) -> Parts:
    """BLIP-2 (arXiv 2301.12597): ViT, a Q-Former with 16 queries, OPT."""
    words = _words(seed, ["<image>"])  # its processor brings the image token itself
    text = {key: value for key, value in _TEXT.items() if key != "intermediate_size"}
    config = t.Blip2Config(
        vision_config=t.Blip2VisionConfig(**_VISION).to_dict(),
        qformer_config=t.Blip2QFormerConfig(
            vocab_size=32,
            hidden_size=WIDTH,
            intermediate_size=MLP,
            num_hidden_layers=4,
            num_attention_heads=HEADS,
            encoder_hidden_size=WIDTH,
            max_position_embeddings=64,
        ).to_dict(),
        text_config=t.OPTConfig(**text, ffn_dim=MLP, word_embed_proj_dim=WIDTH, dropout=0.0, tie_word_embeddings=True).to_dict(),
        num_query_tokens=CELLS,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    images = t.BlipImageProcessorPil(size={"height": TILE, "width": TILE})
    processor = t.Blip2Processor(images, words, num_query_tokens=CELLS)
    return Parts(t.Blip2ForConditionalGeneration(config), processor, _generation())


def _prefix_types(batch: dict[str, Tensor]) -> dict[str, Any]:
    """PaliGemma's token types: 0 on the prefix, 1 on the answer."""
    types = (~batch["prefix"]).long()
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")} | {"token_type_ids": types}


def _image_mask(batch: dict[str, Tensor]) -> dict[str, Any]:
    """IDEFICS: every token from the image's own on sees it."""
    seen = (batch["input_ids"] == _IDEFICS_IMAGE).cumsum(-1).clamp(max=1)[..., None]
    named = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return named | {"pixel_values": batch["pixel_values"][:, None], "image_attention_mask": seen}


_IDEFICS_IMAGE = 5


def _plain(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def _texts(processor: Any, images: list[Any], prompts: list[str]) -> Any:
    return processor(text=prompts, images=images, padding=True, return_tensors="pt")


STUDENTS: dict[str, Student] = {
    "paligemma": Student(
        paligemma,
        lambda ids, words, question: [*[words.convert_tokens_to_ids("<image>")] * CELLS, 1, *ids(f"{question}\n")],
        _prefix_types,
        "model.multi_modal_projector",
        lambda processor, images, prompts: _texts(processor, images, [f"<image>{prompt}" for prompt in prompts]),
    ),
    "idefics": Student(
        idefics,
        lambda ids, words, question: [1, *ids(f"{FENCE}<image>{FENCE}{question}")],
        _image_mask,
        "model.perceiver_resampler",
        lambda processor, images, prompts: processor(
            text=[[image, prompt] for image, prompt in zip(images, prompts, strict=True)], padding=True, return_tensors="pt"
        ),
    ),
    "blip2": Student(
        blip2,
        lambda ids, words, question: [*[words.convert_tokens_to_ids("<image>")] * CELLS, 1, *ids(question)],
        _plain,
        "language_projection",
        _texts,
    ),
}
