"""Train one of the students (benchmarks/train/students.py), save it in float16 and measure it.

Next-token loss on the answer, and, where the eyes have something to learn, a loss that is dropped afterwards: linear probes on
the tokens that show the image must name each cell's shape, colour and digit, without which they learn an order of magnitude
more slowly. Where resamplers and poolers stand between eyes and words, each thing's token must also tell on which side of the
other thing it lies: one word of a caption teaches that too seldom. Float32 throughout.

    python -m benchmarks.train.teach paligemma
    python -m benchmarks.train.teach idefics --minutes 5 --out /tmp/idefics
    python -m benchmarks.train.teach simvlm --until 0.95       until that much of 300 other held-out questions is right
"""

# mypy: disallow-untyped-calls=false
# (transformers leaves most of its constructors untyped)

from __future__ import annotations

import dataclasses
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
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.train import scenes
from benchmarks.train.data import IGNORED, cell_targets
from benchmarks.train.loop import Probes
from benchmarks.train.models import WIDTH, Parts
from benchmarks.train.student import CELLS, Student, answers, examples, half
from benchmarks.train.students import STUDENTS
from benchmarks.train_tiny import _save, _versions

SIDES = ("", "left of", "right of", "above", "below")
"""Of the other thing, where a scene has two."""


class Lessons:
    """An endless, seeded stream of batches: scenes, each with its caption and some questions."""

    def __init__(self, student: Student, parts: Parts, seed: int, forget: float = 0.0) -> None:
        self.student, self.rng, self.forget = student, random.Random(f"teach-{seed}"), forget
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
            if "input_ids" in real:  # captions begin with what generation_config.json says
                assert real["input_ids"][0].tolist() == ours, (self.words.decode(real["input_ids"][0]), self.words.decode(ours))
            assert np.abs(real["pixel_values"].numpy().reshape(3, 64, 64) - self.pixels(example.image)).max() < 1e-5

    def _heard(self, token: int) -> int:
        hidden = self.forget > 0 and self.rng.random() < self.forget
        return int(self.words.unk_token_id) if hidden else token

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
            targets.append(cell_targets(scene, list(range(16))) | {"side": _sides(scene)})
            for question, answer in told:
                before = self.student.before(self.ids, self.words, question)
                rows.append((before, [*self.ids(f" {answer}"), self.words.eos_token_id]))
                pixels.append(image)
        length = max(len(before) + len(answer) for before, answer in rows)
        ids = torch.full((len(rows), length), self.words.pad_token_id)
        labels, mask, prefix = torch.full_like(ids, IGNORED), torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
        for i, (asked_ids, told_ids) in enumerate(rows):
            start, end = len(asked_ids), len(asked_ids) + len(told_ids)
            ids[i, :end] = torch.tensor([*asked_ids, *map(self._heard, told_ids)])
            labels[i, start:end] = torch.tensor(told_ids)
            mask[i, :end], prefix[i, :start] = 1, True
        batch = {"input_ids": ids, "attention_mask": mask, "prefix": prefix, "labels": labels}
        batch["pixel_values"] = torch.from_numpy(np.stack(pixels))
        return batch, {key: torch.tensor([target[key] for target in targets]) for key in targets[0]}


def train(
    student: Student,
    seed: int,
    steps: int,
    minutes: float | None,
    report: Callable[[int, float, dict[str, float]], None],
    done_at: Callable[[int, Parts], bool] | None = None,
    start: Path | None = None,
    forget: float = 0.0,
) -> tuple[Parts, int]:
    """The trained model with its processor, and the number of steps made.

    `done_at(step, parts)` is asked after every step whether the student knows enough already. `start`: a checkpoint of this
    student to go on from. `forget`: the share of an answer's words that are hidden as the model goes on (word dropout, arXiv
    1511.06349, section 3.1): it looks again instead of going by which colours and shapes went together.
    """
    torch.manual_seed(seed)
    parts = student.build(seed)
    if start is not None:
        parts.model.load_state_dict(load_file(start / "model.safetensors"), strict=False)  # tied weights are there once
    model: Any = parts.model.train()
    probes, lessons = Probes(WIDTH), Lessons(student, parts, seed, forget)
    sides = nn.Linear(WIDTH, len(SIDES)) if student.sides else None
    lessons.check(parts.processor)
    kept: list[Tensor] = []
    if student.seen is not None and start is None:  # fresh probes would unsettle eyes that see
        model.get_submodule(student.seen).register_forward_hook(lambda module, given, result: kept.append(_first(result)))
    hooks = _look_once(model.get_submodule(student.eyes), student.talks)
    judges = nn.ModuleList([probes] if sides is None else [probes, sides])
    weights = [weight for weight in (*model.parameters(), *judges.parameters()) if weight.requires_grad]
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
        kept.clear()
        arguments = student.call(batch)
        losses = {
            "text": _next_token(model, batch, arguments)
            if student.objective is None
            else student.objective(model, batch, arguments, parts)
        }
        if kept:
            shown = kept[0][:, -CELLS:]
            shown = shown if len(shown) == student.batch else shown[:: student.talks]
            losses["cells"] = probes(shown, targets)
            if sides is not None:
                weight = torch.tensor([0.1, 1.0, 1.0, 1.0, 1.0])
                losses["sides"] = F.cross_entropy(sides(shown).flatten(0, 1), targets["side"].flatten(), weight)
        optimiser.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        step += 1
        report(step, elapsed, {key: float(loss.detach()) for key, loss in losses.items()})
        if done_at is not None and done_at(step, parts):
            break
    for hook in hooks:
        hook.remove()
    model.eval()
    return parts, step


def _sides(scene: scenes.Scene) -> list[int]:
    """For each cell the number of the side of the other thing on which the cell's thing lies."""
    found = [0] * CELLS
    if scene.relation:
        for thing, side in zip(scene.things, (scene.relation, scenes.OPPOSITE[scene.relation]), strict=True):
            found[thing.row * scene.columns + thing.column] = SIDES.index(side)
    return found


def _next_token(model: Any, batch: dict[str, Tensor], arguments: dict[str, Any]) -> Tensor:
    labels = batch["labels"]
    logits = model(**arguments, use_cache=False).logits[:, :-1]
    chosen = labels[:, 1:] != IGNORED
    return F.cross_entropy(logits[:, -labels.shape[1] + 1 :][chosen], labels[:, 1:][chosen])


def _look_once(eyes: nn.Module, talks: int) -> list[Any]:
    """Lets `eyes` see each picture once while training; what they say is repeated for the `talks` rows about it."""
    if talks == 1:
        return []

    def fewer(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if not module.training:
            return None
        return tuple(map(_pick, given)), {name: _pick(value) for name, value in named.items()}

    def _pick(value: Any) -> Any:
        return value[::talks] if isinstance(value, Tensor) and value.ndim == 4 else value

    def more(module: nn.Module, given: Any, result: Any) -> Any:
        return _repeated(result, talks) if module.training else result

    return [eyes.register_forward_pre_hook(fewer, with_kwargs=True), eyes.register_forward_hook(more)]


def _repeated(result: Any, times: int) -> Any:
    if isinstance(result, Tensor):
        return result.repeat_interleave(times, 0)
    if isinstance(result, dict):  # a ModelOutput
        return type(result)(**{name: _repeated(value, times) for name, value in result.items()})
    return tuple(_repeated(value, times) for value in result) if isinstance(result, tuple) else result


def _first(result: Any) -> Tensor:
    found: Tensor = result if isinstance(result, Tensor) else result[0]
    return found


def measure(folder: Path, name: str, count: int = 2000) -> tuple[dict[str, float], list[tuple[str, str, str]]]:
    """Exact match on held-out scenes by the saved checkpoint's own processor and greedy `generate`, and the wrong answers."""
    from transformers import AutoModelForImageTextToText

    student = STUDENTS[name]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    processor = student.processor(folder)
    asked = examples(student, count)
    given = answers(student, model, processor, asked)
    wrong = [(one.prompt, one.answer, text) for one, text in zip(asked, given, strict=True) if text != one.answer]
    found = {"held-out captions" if student.captions else "held-out scenes": 1.0 - len(wrong) / len(asked)}
    if not student.captions:
        for label, captions in (("captions", True), ("questions", False)):
            total = sum((one.prompt in scenes.DESCRIBE) == captions for one in asked)
            missed = sum((prompt in scenes.DESCRIBE) == captions for prompt, _, _ in wrong)
            found[f"held-out {label}"] = 1.0 - missed / total
    if student.further is not None:
        found |= student.further(model, processor)
    return found, wrong


@click.command()
@click.argument("name", type=click.Choice(sorted(STUDENTS)))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the checkpoint [build/tiny-NAME].")
@click.option("--seed", default=0, show_default=True)
@click.option("--steps", type=int, help="Training steps at most [the student's own]; the rate falls towards them.")
@click.option("--until", type=float, help="Stop when this share of 300 held-out questions is right (asked every 200 steps).")
@click.option("--rate", type=float, help="Learning rate [the student's own].")
@click.option("--forget", default=0.0, show_default=True, help="Share of an answer's words that are hidden as it goes on.")
@click.option("--minutes", type=float, help="Stop by the clock instead; quick to try, but not reproducible.")
@click.option(
    "--start", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkpoint of NAME to go on from."
)
@click.option(
    "--measure",
    "measured",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Only measure this checkpoint of NAME.",
)
@click.option("--count", default=2000, show_default=True, help="Held-out questions to measure on.")
def main(
    name: str,
    out: Path | None,
    seed: int,
    steps: int | None,
    until: float | None,
    rate: float | None,
    forget: float,
    minutes: float | None,
    start: Path | None,
    measured: Path | None,
    count: int,
) -> None:
    """Train the student NAME, save it and measure it on held-out scenes."""
    torch.set_num_threads(1)
    student, folder, console = STUDENTS[name], out or Path("build") / f"tiny-{name}", Console()
    if rate is not None:
        student = dataclasses.replace(student, rate=rate)
    if measured is not None:
        _print(console, measured, *measure(measured, name, count))
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    smooth: dict[str, float] = {}

    def report(step: int, elapsed: float, losses: dict[str, float]) -> None:
        for key, loss in losses.items():
            smooth[key] = 0.98 * smooth.get(key, loss) + 0.02 * loss
        if step % 50 == 0:
            text = " ".join(f"{key} {value:.4f}" for key, value in smooth.items())
            console.print(f"step {step} {elapsed:.0f} s {text}", highlight=False)

    def enough(step: int, parts: Parts) -> bool:
        if until is None or step % 200:
            return False
        asked = examples(student, 300, seed=1)  # not those that it is measured on
        state = torch.get_rng_state()
        said = answers(student, half(parts), parts.processor, asked)
        torch.set_rng_state(state)
        right = sum(text == one.answer for one, text in zip(asked, said, strict=True)) / len(asked)
        console.print(f"step {step}: {right:.1%} of {len(asked)} held-out questions", highlight=False)
        return right >= until

    began, total = time.monotonic(), steps or student.steps
    parts, made = train(student, seed, total, minutes, report, enough, start, forget)
    _save(parts, folder)
    accuracy, wrong = measure(folder, name, count)
    command = f"python -m benchmarks.train.teach {name} --seed {seed} --steps {total}"
    command += (f" --until {until}" if until is not None else "") + (f" --rate {rate}" if rate is not None else "")
    command += f" --forget {forget}" if forget else ""
    if start is not None:
        before = json.loads((start / "training.json").read_text())["command"]
        command = f"{before} --out {start.name} && {command} --start {start.name}"
    record = {
        "command": command,
        "donor": student.donor,
        "accuracy": {key: round(value, 5) for key, value in accuracy.items()},
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
    console.print(f"{made} steps")
    _print(console, folder, accuracy, wrong)


def _print(console: Console, folder: Path, accuracy: dict[str, float], wrong: list[tuple[str, str, str]]) -> None:
    console.print(f"{folder}: {', '.join(f'{key} {value:.2%}' for key, value in accuracy.items())}", highlight=False)
    for prompt, wanted, given in wrong[:20]:
        console.print(f"  {prompt}  wanted: {wanted}  answered: {given}", highlight=False)


if __name__ == "__main__":
    main()
