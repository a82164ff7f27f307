"""Accuracy of a saved checkpoint, measured as a user would run it: its own processor, greedy ``generate``.

The checkpoint is read from float16 into float32. Run ``python -m benchmarks.train.evaluate DIR``.
"""

# mypy: disallow-untyped-calls=false
# (transformers leaves most of its constructors untyped)

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from benchmarks.train import easyvqa, scenes

TARGETS = {"easy-vqa test": 0.95, "held-out scenes": 0.95, "image to text, top 1 of 64": 0.9, "text to image, top 1 of 64": 0.9}
"""What the committed checkpoints must reach."""


def load(folder: Path) -> tuple[Any, Any]:
    """Return the model of ``folder`` in float32 and its processor, without touching the network."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    auto = AutoModel if kind == "clip" else AutoModelForImageTextToText
    model = auto.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return model, AutoProcessor.from_pretrained(folder, local_files_only=True)


def messages(prompt: str) -> list[dict[str, Any]]:
    """Return one user turn of an image and ``prompt``, as chat templates take it."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]


@torch.inference_mode()
def answers(model: Any, processor: Any, examples: Sequence[scenes.Example], batch: int = 64) -> list[str]:
    """Return the model's greedy answers, in order; the checkpoint's generation_config.json ends them."""
    found: list[str] = []
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        texts = [processor.apply_chat_template(messages(e.prompt), add_generation_prompt=True) for e in part]
        inputs = processor(text=texts, images=[[e.image] for e in part], padding=True, return_tensors="pt")
        made = model.generate(**inputs.to(model.device))[:, inputs["input_ids"].shape[1] :]
        found += [text.strip() for text in processor.tokenizer.batch_decode(made, skip_special_tokens=True)]
    return found


def exact_match(model: Any, processor: Any, examples: Sequence[scenes.Example]) -> tuple[float, list[tuple[str, str, str]]]:
    """Return the fraction of answers that are right to the letter, and (prompt, wanted, answered) of the others."""
    given = answers(model, processor, examples)
    wrong = [(e.prompt, e.answer, text) for e, text in zip(examples, given, strict=True) if text != e.answer]
    return 1.0 - len(wrong) / len(examples), wrong


@torch.inference_mode()
def retrieval(model: Any, processor: Any, pools: int = 16, size: int = 64) -> tuple[float, float]:
    """Return top-1 accuracy image to text and text to image over ``pools`` pools of ``size`` different held-out captions."""
    right = torch.zeros(2)
    for seed in range(pools):
        images, captions = zip(*scenes.held_out_captions(size, seed), strict=True)
        inputs = processor(text=list(captions), images=list(images), padding=True, return_tensors="pt")
        out = model(**inputs)
        similarity = F.normalize(out.image_embeds, dim=-1) @ F.normalize(out.text_embeds, dim=-1).T
        truth = torch.arange(size)
        right += torch.stack([(similarity.argmax(axis) == truth).sum() for axis in (1, 0)])
    to_text, to_image = (right / (pools * size)).tolist()
    return to_text, to_image


def measure(folder: Path, limit: int | None = None, seed: int = 0) -> tuple[dict[str, float], list[tuple[str, str, str]]]:
    """Return every accuracy that applies to the checkpoint in ``folder`` and its wrong answers on held-out scenes.

    ``limit`` bounds the questions per set: without it, all 9,673 of easy-vqa and 2,000 about held-out scenes.
    """
    model, processor = load(folder)
    kind = model.config.model_type
    if kind == "clip":
        to_text, to_image = retrieval(model, processor)
        return {"image to text, top 1 of 64": to_text, "text to image, top 1 of 64": to_image}, []
    named = "llava" if kind == "llava" else "smolvlm"
    own = scenes.held_out_examples(limit or 2000, seed, "llava" if kind == "llava" else "smolvlm")
    accuracy, wrong = exact_match(model, processor, own)
    found = {"held-out scenes": accuracy}
    for label, captions in (("captions", True), ("questions", False)):
        total = sum((e.prompt in scenes.DESCRIBE) == captions for e in own)
        missed = sum((prompt in scenes.DESCRIBE) == captions for prompt, _, _ in wrong)
        found[f"held-out {label}"] = 1.0 - missed / total
    if named == "llava":
        found["easy-vqa test"] = exact_match(model, processor, easyvqa.test_examples(limit))[0]
    return found, wrong


def table(title: str, found: dict[str, float]) -> Table:
    """Return the accuracies as a table, with what is asked of them."""
    shown = Table(title=title)
    for heading in ("measured on", "accuracy", "asked"):
        shown.add_column(heading, justify="left" if heading == "measured on" else "right")
    for key, value in found.items():
        wanted = TARGETS.get(key)
        shown.add_row(key, f"{value:.2%}", "" if wanted is None else f"≥ {wanted:.0%}")
    return shown


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--limit", type=int, help="Ask at most this many questions of each set (default: all).")
@click.option("--wrong", "shown", type=int, default=0, help="Print this many of the wrong answers.")
def main(folder: Path, limit: int | None, shown: int) -> None:
    """Measure the checkpoint in FOLDER with its own processor and greedy generation."""
    found, wrong = measure(folder, limit)
    console = Console()
    console.print(table(folder.name, found))
    for prompt, wanted, given in wrong[:shown]:
        console.print(f"{prompt}  wanted: {wanted}  answered: {given}", highlight=False)


if __name__ == "__main__":
    main()
