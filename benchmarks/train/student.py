"""What a student is: one class to train on the scenes, how it is called, and what it has from a teacher."""

# mypy: disallow-untyped-calls=false
# (transformers leaves most of its constructors untyped)

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as t
from torch import Tensor

from benchmarks.train import scenes
from benchmarks.train import tokenizer as tokenizers
from benchmarks.train.models import HEADS, MLP, PATCH, TILE, WIDTH, Parts

CELLS = (TILE // PATCH) ** 2
"""Cells of a scene's grid, each of which is one patch."""

IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "image_size": TILE,
    "patch_size": PATCH,
    "hidden_act": "quick_gelu",  # the donor's
}
TEXT: dict[str, Any] = {
    "vocab_size": tokenizers.VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 512,
    **IDS,
}

Words = Callable[[str], list[int]]
"""The tokenizer without special tokens."""


@dataclass(frozen=True, slots=True)
class Student:
    """One class to train.

    `build(seed)` makes model and processor; weights that come from a donor are already in place (donors.py).
    `before(ids, tokenizer, question)` are the tokens before the answer. `call(tensors)` turns a batch (input_ids, attention_mask,
    pixel_values, prefix) into the model's arguments, `prefix` being true where a token stands before the answer.
    `inputs(processor, images, prompts)` calls the checkpoint's own processor, as a user would; `processor(folder)` loads it.

    `eyes` names the part of the model that reads the pixels: it is run once for all rows about one picture. `seen` names the
    part whose output ends with the image's cells in order, one token for each; a linear probe on it helps the eyes along (None:
    they need no help); `sides`: those of two things must also tell how these lie. `objective(model, batch,
    arguments, parts)` is the loss where it is not that of the next token alone.
    `captions`: it only describes. `donor`: what it has from whom, in words.
    """

    build: Callable[[int], Parts]
    before: Callable[[Words, Any, str], list[int]]
    call: Callable[[dict[str, Tensor]], dict[str, Any]]
    inputs: Callable[[Any, list[Any], list[str]], Any]
    eyes: str
    seen: str | None
    processor: Callable[[Path], Any] = field(
        default=lambda folder: t.AutoProcessor.from_pretrained(folder, local_files_only=True)
    )
    objective: Callable[[Any, dict[str, Tensor], dict[str, Any], Parts], Tensor] | None = None
    further: Callable[[Any, Any], dict[str, float]] | None = None
    """Further accuracies of a saved model with its processor."""
    sides: bool = False
    captions: bool = False
    donor: str = ""
    steps: int = 3000
    batch: int = 24
    talks: int = 3
    rate: float = 1e-3


class SideBySide:
    """An image processor and a tokenizer in one folder, for classes that have no processor of their own."""

    def __init__(self, images: Any, words: Any, written: dict[str, Any] | None = None) -> None:
        self.image_processor, self.tokenizer, self._written = images, words, written

    def save_pretrained(self, folder: Path) -> None:
        """Writes the tokenizer, its chat template and, where `written` says so, processor_config.json."""
        self.tokenizer.save_pretrained(folder)
        if self._written is not None:
            (folder / "processor_config.json").write_text(json.dumps(self._written, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path) -> SideBySide:
        """Reads both from a folder."""
        images = t.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        return cls(images, t.AutoTokenizer.from_pretrained(folder, local_files_only=True))


def generation(**more: Any) -> t.GenerationConfig:
    """Greedy, at most 24 tokens."""
    return t.GenerationConfig(**IDS, do_sample=False, max_new_tokens=24, **more)


def plain(batch: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of a class that takes them under their usual names."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def prefix_types(batch: dict[str, Tensor]) -> dict[str, Any]:
    """PaliGemma's and SimVLM's token types: 0 on the prefix, 1 on the answer."""
    return plain(batch) | {"token_type_ids": (~batch["prefix"]).long()}


@torch.inference_mode()
def answers(student: Student, model: Any, processor: Any, examples: list[scenes.Example], batch: int = 50) -> list[str]:
    """Greedy answers in order, by the checkpoint's own processor and `generate`."""
    found: list[str] = []
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        inputs = student.inputs(processor, [one.image for one in part], [one.prompt for one in part])
        made = model.generate(**inputs)
        given = inputs.get("input_ids")
        if given is not None and made.shape[1] > given.shape[1] and torch.equal(made[:, : given.shape[1]], given):
            made = made[:, given.shape[1] :]
        found += [text.strip() for text in processor.tokenizer.batch_decode(made, skip_special_tokens=True)]
    return found


def examples(student: Student, count: int, seed: int = 0) -> list[scenes.Example]:
    """Held-out scenes: captions and questions in turn, or captions alone."""
    if not student.captions:
        return scenes.held_out_examples(count, seed)
    return scenes.held_out_examples(2 * count, seed)[::2]


def half(parts: Parts) -> Any:
    """A copy in float32 of the model that the float16 file will hold."""
    found: Any = copy.deepcopy(parts.model).half().float().eval()
    found.generation_config = parts.generation
    return found
