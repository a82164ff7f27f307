"""Train one of the small checkpoints in ``tests/checkpoints`` and measure it.

Quantisation does not visibly hurt random weights, so claims about accuracy need models that know something. These know
rendered scenes and, for LLaVA, the published easy-vqa questions.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.train import evaluate, loop, models


def _versions() -> dict[str, str]:
    import PIL
    import tokenizers

    packages: dict[str, Any] = {"torch": torch, "transformers": transformers, "tokenizers": tokenizers, "pillow": PIL}
    return {"python": platform.python_version(), **{name: str(package.__version__) for name, package in packages.items()}}


def _save(parts: models.Parts, folder: Path) -> None:
    """Write the checkpoint beside ``folder`` first, so that an interruption never leaves half of one there."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    parts.save(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


@click.command()
@click.argument("model", type=click.Choice(sorted(loop.RECIPES)))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the checkpoint [build/tiny-MODEL].")
@click.option("--seed", default=0, show_default=True, help="Seed of the weights, the tokenizer's corpus and the data.")
@click.option("--steps", type=int, help="Training steps; the default is the recipe that the committed checkpoint was made by.")
@click.option("--minutes", type=float, help="Stop by the clock instead; quick to try, but not reproducible.")
@click.option("--threads", type=int, help="CPU threads of torch; sums are ordered by it, so it belongs to the recipe [1].")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--limit", type=int, help="Measure on at most this many questions of each set (default: all).")
def main(
    model: models.Name,
    out: Path | None,
    seed: int,
    steps: int | None,
    minutes: float | None,
    threads: int | None,
    device: str,
    limit: int | None,
) -> None:
    """Train MODEL (llava, smolvlm or clip) from nothing, save it in float16 and measure the saved files.

    \b
      python -m benchmarks.train_tiny llava                    the committed recipe, 30 to 60 minutes on one core
      python -m benchmarks.train_tiny clip --minutes 1         a first look
      python -m benchmarks.train_tiny smolvlm --seed 1 --out /tmp/other

    The folder holds what transformers reads (config.json, model.safetensors, tokenizer.json, processor and chat template)
    and training.json: the accuracies, the seed, the steps and the versions of the packages. Compositions in the test
    set are never shown in training, and every accuracy comes from the saved checkpoint's own processor and generate().
    """
    folder = out or Path("build") / f"tiny-{model}"
    torch.set_num_threads(threads or 1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    console = Console()
    recipe = loop.RECIPES[model]
    total = steps or recipe.steps
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)
    smooth: dict[str, float] = {}
    start = time.monotonic()
    with bar:
        task = bar.add_task(f"training {model}", total=total if minutes is None else 1000)

        def report(step: int, done: float, elapsed: float, losses: dict[str, float]) -> None:
            for key, loss in losses.items():
                smooth[key] = 0.98 * smooth.get(key, loss) + 0.02 * loss
            text = " ".join(f"{key} {value:.4f}" for key, value in smooth.items())
            bar.update(task, completed=step if minutes is None else int(1000 * done), description=f"training {model}: {text}")
            if not console.is_terminal and step % 250 == 0:
                console.print(f"step {step} {elapsed:.0f} s {text}", highlight=False)

        parts, made = loop.train(model, seed, report, steps, minutes, device)
    trained = time.monotonic() - start
    _save(parts, folder)
    found, wrong = evaluate.measure(folder, limit)
    record = {
        "command": f"python -m benchmarks.train_tiny {model} --seed {seed} --steps {made}",
        "accuracy": {key: round(value, 5) for key, value in found.items()},
        "measured_with": "AutoProcessor and greedy generate() on the saved float16 checkpoint, computed in float32",
        "questions_per_set": limit or "all",
        "seed": seed,
        "steps": made,
        "batch": recipe.batch,
        "threads": torch.get_num_threads(),
        "device": device,
        "training_seconds": round(trained),
        "final_losses": {key: round(value, 5) for key, value in smooth.items()},
        "parameters": sum(weight.numel() for weight in parts.model.parameters()),
        "versions": _versions(),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print(evaluate.table(f"{folder}: {made} steps in {trained:.0f} s", found))
    for prompt, wanted, given in wrong[:10]:
        console.print(f"  {prompt}  wanted: {wanted}  answered: {given}", highlight=False)


if __name__ == "__main__":
    main()
