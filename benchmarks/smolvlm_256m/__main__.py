"""`make bench`: builds the model, exports it, then runs ours and transformers' eager generate in turn and prints the table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from vlm_edge.cli.console import table

from .model import make

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "out/smolvlm-256m"
CHECKPOINT = WORK / "checkpoint"
BUNDLE = WORK / "smolvlm-256m.vlm"
RESULTS = ROOT / "benchmarks/results"
COLUMNS = {
    "vision_ms_per_tile": ("vision ms/tile", ".0f"),
    "ttft_s": ("TTFT s", ".2f"),
    "decode_tps": ("decode tok/s", ".1f"),
    "rss_mb": ("peak RSS MB", ".0f"),
    "cold_s": ("cold start to first token s", ".2f"),
    "size_mb": ("weights MB", ".0f"),
}
console = Console()


def _worker(module: str, *args: object) -> dict[str, Any]:
    """One contender's process; raises with its last words when it fails."""
    environment = {**os.environ, "BENCH_BEGAN": str(time.time()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"benchmarks.smolvlm_256m.{module}", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode != 0 or not lines:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


def prepare(builds: tuple[str, ...]) -> None:
    """Makes checkpoint, bundle and builds that are not there yet."""
    make(CHECKPOINT)
    if not (BUNDLE / "manifest.json").is_file():
        subprocess.run([sys.executable, "-m", "vlm_edge", "export", CHECKPOINT, BUNDLE], check=True, cwd=ROOT)
    have = json.loads((BUNDLE / "manifest.json").read_text())["builds"]
    for build in builds:
        if build not in have:
            subprocess.run([sys.executable, "-m", "vlm_edge", "build", BUNDLE, "--target", build], check=True, cwd=ROOT)


def compare(builds: tuple[str, ...], split: bool, rounds: int, runs: int) -> dict[str, dict[str, float]]:
    """Every contender `rounds` times, in turn; medians over the rounds."""
    contenders: dict[str, tuple[str, tuple[object, ...]]] = {f"vlm-edge {build}": ("ours", (BUNDLE, build)) for build in builds}
    contenders["transformers eager fp32"] = ("eager", (CHECKPOINT,))
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    picture = "split" if split else "whole"
    for number in range(rounds):
        for name, (module, args) in contenders.items():
            console.print(f"[dim]round {number + 1}/{rounds}: {name}[/]", highlight=False)
            row = _worker(module, *args, "steady", picture, runs)
            taken[name].append({**row, **_worker(module, *args, "cold", picture, 1)})
    return {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in taken.items()}


def markdown(results: dict[str, dict[str, float]], title: str) -> str:
    """The table as Markdown, with each figure's ratio to transformers eager."""
    base = results["transformers eager fp32"]
    lines = [
        f"### {title}",
        "",
        "| | " + " | ".join(head for head, _ in COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in results.items():
        cells = [f"{format(row[key], form)} (×{row[key] / base[key]:.2f})" for key, (_, form) in COLUMNS.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--build", "builds", multiple=True, default=("cpu-int4", "cpu-int8"), show_default=True)
@click.option(
    "--tiles",
    type=click.Choice(["1", "17"]),
    default="1",
    show_default=True,
    help="1: the picture as one 512 px tile; 17: split as SmolVLM does by default.",
)
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True, help="Processes per contender.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Timed answers per process (medians).")
@click.option("--save/--no-save", default=False, help="Write JSON and Markdown into benchmarks/results.")
def main(builds: tuple[str, ...], tiles: str, rounds: int, runs: int, save: bool) -> None:
    """A SmolVLM-256M-shaped model with random weights: vlm-edge beside transformers' eager generate, interleaved."""
    prepare(builds)
    results = compare(builds, tiles == "17", rounds, runs)
    title = f"SmolVLM-256M shape, {tiles} tile(s), {os.cpu_count()} cores, medians of {rounds} rounds × {runs} runs"
    drawn = table(title, "", *(head for head, _ in COLUMNS.values()), right=tuple(head for head, _ in COLUMNS.values()))
    for name, row in results.items():
        drawn.add_row(name, *(format(row[key], form) for key, (_, form) in COLUMNS.items()))
    console.print(drawn)
    if save:
        RESULTS.mkdir(exist_ok=True)
        stem = RESULTS / f"smolvlm_256m_{tiles}_tiles"
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        stem.with_suffix(".json").write_text(json.dumps({"title": title, **machine, "results": results}, indent=2) + "\n")
        stem.with_suffix(".md").write_text(markdown(results, title))
        console.print(f"saved: {stem.relative_to(ROOT)}.json and .md")


if __name__ == "__main__":
    main()
