"""Train one of the students (benchmarks/train/students.py) from nothing, save it in float16 and measure it.

Next-token loss on the answer, and a loss that is dropped afterwards: linear probes on the tokens that show the image must name
each cell's shape, colour and digit, without which the eyes learn an order of magnitude more slowly. Float32 throughout.

    python -m benchmarks.train.teach paligemma
    python -m benchmarks.train.teach idefics --minutes 5 --out /tmp/idefics
"""

# mypy: disallow-untyped-calls=false
# (transformers leaves most of its constructors untyped)

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.train import scenes
from benchmarks.train.data import IGNORED, cell_targets
from benchmarks.train.loop import Probes
from benchmarks.train.models import WIDTH, Parts
from benchmarks.train.students import STUDENTS, Student
from benchmarks.train_tiny import _save, _versions


class Lessons:
    """An endless, seeded stream of batches: scenes, each with its caption and some questions."""

    def __init__(self, student: Student, parts: Parts, seed: int) -> None:
        self.student, self.rng = student, random.Random(f"teach-{seed}")
        self.words = parts.processor.tokenizer
        self._known: dict[str, list[int]] = {}
        images = parts.processor.image_processor
        self._mean = np.asarray(images.image_mean, np.float32).reshape(3, 1, 1)
        self._std = np.asarray(images.image_std, np.float32).reshape(3, 1, 1)

    def ids(self, text: str) -> list[int]:
        """The token ids of a text without added special tokens."""
        if text not in self._known:
            self._known[text] = self.words(text, add_special_tokens=False)["input_ids"]
        return self._known[text]

    def pixels(self, image: Any) -> np.ndarray:
        """float32 (3, 64, 64), as the image processor makes it of a picture of that size."""
        values = np.asarray(image, np.float32).transpose(2, 0, 1) * np.float32(1 / 255)
        return (values - self._mean) / self._std

    def check(self, processor: Any) -> None:
        """Raises AssertionError unless tokens and pixels are those of the processor itself."""
        for example in scenes.held_out_examples(8, 1):
            real = self.student.inputs(processor, [example.image], [example.prompt])
            ours = self.student.before(self.ids, self.words, example.prompt)
            assert real["input_ids"][0].tolist() == ours, (self.words.decode(real["input_ids"][0]), self.words.decode(ours))
            assert np.abs(real["pixel_values"].numpy().reshape(3, 64, 64) - self.pixels(example.image)).max() < 1e-5

    def next(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(batch, cell targets of its pictures). Pictures come in runs of `talks` rows."""
        rows, pixels, targets = [], [], []
        for _ in range(self.student.batch):
            scene = scenes.sample(self.rng, "train", 4, 4)
            asked = scenes.questions(scene, self.rng, "train")
            self.rng.shuffle(asked)
            if self.rng.random() < 0.5:  # relations take longest to learn
                asked.sort(key=lambda pair: not pair[0].startswith("where is"))
            told = [(self.rng.choice(scenes.DESCRIBE), scene.caption), *asked]
            told = [told[i % len(told)] for i in range(self.student.talks)]
            image = self.pixels(scene.render())
            targets.append(cell_targets(scene, list(range(16))))
            for question, answer in told:
                before = self.student.before(self.ids, self.words, question)
                rows.append((before, [*self.ids(f" {answer}"), self.words.eos_token_id]))
                pixels.append(image)
        length = max(len(before) + len(answer) for before, answer in rows)
        ids = torch.full((len(rows), length), self.words.pad_token_id)
        labels, mask, prefix = torch.full_like(ids, IGNORED), torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
        for i, (asked_ids, told_ids) in enumerate(rows):
            start, end = len(asked_ids), len(asked_ids) + len(told_ids)
            ids[i, :end] = torch.tensor([*asked_ids, *told_ids])
            labels[i, start:end] = torch.tensor(told_ids)
            mask[i, :end], prefix[i, :start] = 1, True
        batch = {"input_ids": ids, "attention_mask": mask, "prefix": prefix, "labels": labels}
        batch["pixel_values"] = torch.from_numpy(np.stack(pixels))
        return batch, {key: torch.tensor([target[key] for target in targets]) for key in targets[0]}


def train(
    student: Student, seed: int, steps: int, minutes: float | None, report: Callable[[int, float, dict[str, float]], None]
) -> tuple[Parts, int]:
    """The trained model with its processor, and the number of steps made."""
    torch.manual_seed(seed)
    parts = student.build(seed)
    model: Any = parts.model.train()
    probes, lessons = Probes(WIDTH), Lessons(student, parts, seed)
    lessons.check(parts.processor)
    kept: list[Tensor] = []
    model.get_submodule(student.seen).register_forward_hook(lambda module, given, result: kept.append(_first(result)))
    weights = [weight for weight in (*model.parameters(), *probes.parameters()) if weight.requires_grad]
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": 0.01},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, student.rate, betas=(0.9, 0.98))
    began, step = time.monotonic(), 0
    while True:
        elapsed = time.monotonic() - began
        done = elapsed / (60 * minutes) if minutes else step / steps
        if done >= 1.0:
            break
        decay = 1.0 if done < 0.35 else max(0.02, (1.0 - done) / 0.65)
        for group in optimiser.param_groups:
            group["lr"] = student.rate * min(1.0, (step + 1) / 60) * decay
        batch, targets = lessons.next()
        labels = batch.pop("labels")
        kept.clear()
        logits = model(**student.call(batch), use_cache=False).logits[:, :-1]
        chosen = labels[:, 1:] != IGNORED
        text = F.cross_entropy(logits[:, -labels.shape[1] + 1 :][chosen], labels[:, 1:][chosen])
        cells = probes(kept[0].reshape(len(labels), -1, WIDTH)[:: student.talks], targets)
        optimiser.zero_grad()
        (text + cells).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        step += 1
        report(step, elapsed, {"text": float(text.detach()), "cells": float(cells.detach())})
    model.eval()
    return parts, step


def _first(result: Any) -> Tensor:
    found: Tensor = result if isinstance(result, Tensor) else result[0]
    return found


@torch.inference_mode()
def measure(folder: Path, name: str, count: int = 2000, batch: int = 50) -> tuple[float, list[tuple[str, str, str]]]:
    """Exact match on held-out scenes by the saved checkpoint's own processor and greedy `generate`, and the wrong answers."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    examples = scenes.held_out_examples(count)
    wrong: list[tuple[str, str, str]] = []
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        inputs = STUDENTS[name].inputs(processor, [one.image for one in part], [one.prompt for one in part])
        made = model.generate(**inputs)
        made = made[:, inputs["input_ids"].shape[1] :] if made.shape[1] > inputs["input_ids"].shape[1] else made
        for one, text in zip(part, processor.tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
            if text.strip() != one.answer:
                wrong.append((one.prompt, one.answer, text.strip()))
    return 1.0 - len(wrong) / len(examples), wrong


@click.command()
@click.argument("name", type=click.Choice(sorted(STUDENTS)))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the checkpoint [build/tiny-NAME].")
@click.option("--seed", default=0, show_default=True)
@click.option("--steps", type=int, help="Training steps [the student's own].")
@click.option("--minutes", type=float, help="Stop by the clock instead; quick to try, but not reproducible.")
@click.option("--count", default=2000, show_default=True, help="Held-out questions to measure on.")
def main(name: str, out: Path | None, seed: int, steps: int | None, minutes: float | None, count: int) -> None:
    """Train the student NAME, save it and measure it on held-out scenes."""
    torch.set_num_threads(1)
    student, folder, console = STUDENTS[name], out or Path("build") / f"tiny-{name}", Console()
    folder.parent.mkdir(parents=True, exist_ok=True)
    smooth: dict[str, float] = {}

    def report(step: int, elapsed: float, losses: dict[str, float]) -> None:
        for key, loss in losses.items():
            smooth[key] = 0.98 * smooth.get(key, loss) + 0.02 * loss
        if step % 100 == 0:
            text = " ".join(f"{key} {value:.4f}" for key, value in smooth.items())
            console.print(f"step {step} {elapsed:.0f} s {text}", highlight=False)

    began = time.monotonic()
    parts, made = train(student, seed, steps or student.steps, minutes, report)
    _save(parts, folder)
    accuracy, wrong = measure(folder, name, count)
    record = {
        "command": f"python -m benchmarks.train.teach {name} --seed {seed} --steps {made}",
        "accuracy": {"held-out scenes": round(accuracy, 5)},
        "measured_with": "the checkpoint's own processor and greedy generate() on the saved float16 weights, computed in float32",
        "questions": count,
        "seed": seed,
        "steps": made,
        "batch": student.batch * student.talks,
        "threads": torch.get_num_threads(),
        "training_seconds": round(time.monotonic() - began),
        "final_losses": {key: round(value, 5) for key, value in smooth.items()},
        "parameters": sum(weight.numel() for weight in parts.model.parameters()),
        "versions": _versions(),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"{folder}: {accuracy:.2%} of {count} held-out questions, {made} steps", highlight=False)
    for prompt, wanted, given in wrong[:10]:
        console.print(f"  {prompt}  wanted: {wanted}  answered: {given}", highlight=False)


if __name__ == "__main__":
    main()
