"""`vlm-edge bench`: latency and memory of a bundle's builds, each in a fresh process, taken in turn."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from vlm_edge_runtime.bundle.reader import read_manifest
from vlm_edge_runtime.errors import VlmEdgeError

from .console import echo_json, progress, stdout, table

# key → column title and format; what a family does not have is left out.
COLUMNS = {
    "cold_first_token_s": ("cold start to first token s", ".2f"),
    "cold_first_embedding_s": ("cold start to first embedding s", ".2f"),
    "vision_ms": ("vision ms", ".1f"),
    "image_ms": ("image ms", ".1f"),
    "text_ms": ("text ms", ".1f"),
    "prompt_tokens": ("prompt tokens", ".0f"),
    "ttft_ms": ("TTFT ms", ".1f"),
    "ttft_again_ms": ("TTFT again ms", ".1f"),
    "tpot_ms": ("TPOT ms", ".2f"),
    "prefill_tps": ("prefill tok/s", ".0f"),
    "decode_tps": ("decode tok/s", ".1f"),
    "peak_rss_mb": ("peak RSS MB", ".0f"),
    "weights_mb": ("weights MB", ".1f"),
}


@click.command(name="bench", short_help="Measure latency and memory.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--build", "builds", multiple=True, help="Only this build (repeatable; default: all builds; 'portable' too).")
@click.option("--image", type=click.Path(exists=True, path_type=Path), help="Picture (default: a made-up 512 × 512 one).")
@click.option("--prompt", help="Question (default: made-up text of --prompt-tokens tokens).")
@click.option("--prompt-tokens", type=click.IntRange(1), default=32, show_default=True)
@click.option("--new-tokens", type=click.IntRange(2), default=64, show_default=True, help="Answer length; EOS is ignored.")
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True, help="Timed calls per process (medians).")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Processes per build, builds in turn.")
@click.option("--threads", type=click.IntRange(0), default=0, help="CPU threads (0: physical cores).")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output, no progress.")
def command(
    bundle: Path,
    builds: tuple[str, ...],
    image: Path | None,
    prompt: str | None,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    rounds: int,
    threads: int,
    as_json: bool,
) -> None:
    """Measure BUNDLE: cold start, TTFT, TPOT, vision time, tokens/s, time per graph, peak memory.

    Each build runs in a fresh process, so that memory and cold start are its own; with --rounds the builds take turns.

    \b
    vlm-edge bench tiny-llava.vlm
    vlm-edge bench tiny-llava.vlm --build portable --build cpu-int4 --rounds 3 --json
    """
    manifest = read_manifest(bundle)
    names = list(builds) or list(manifest.builds) or ["portable"]
    task = {"bundle": str(bundle), "image": str(image) if image else None, "prompt": prompt, "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens, "runs": runs, "threads": threads}  # fmt: skip
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with progress(quiet=as_json) as listener:
        for _ in range(rounds):
            for name in names:
                listener.start(f"measure {name}")
                taken[name].append(_in_fresh_process({**task, "build": name}))
                listener.done(f"measure {name}")
    results = {name: _median(rows) for name, rows in taken.items()}
    if as_json:
        echo_json({"bundle": str(bundle), "runs": runs, "rounds": rounds, "results": results})
        return
    shown = [key for key in COLUMNS if any(key in row for row in results.values())]
    drawn = table(f"{bundle}: medians of {runs} runs × {rounds} processes", "", *results, right=tuple(results))
    for key in shown:
        title, form = COLUMNS[key]
        drawn.add_row(title, *(format(row[key], form) if key in row else "–" for row in results.values()))
    roles = dict.fromkeys(role for row in results.values() for role in row["graph_ms"])
    for role in roles:
        cells = (row["graph_ms"].get(role) for row in results.values())
        drawn.add_row(f"[dim]{role} ms a call[/]", *("–" if cell is None else f"{cell:.2f}" for cell in cells))
    stdout.print(drawn)


def _in_fresh_process(task: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "vlm_edge_runtime.measure", json.dumps({**task, "began": time.time()})]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise VlmEdgeError(f"measuring build {task['build']} failed: {last[0]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every number over the processes of one build."""
    merged: dict[str, Any] = {}
    for key, value in rows[0].items():
        if isinstance(value, dict):
            merged[key] = {role: statistics.median(row[key].get(role, 0.0) for row in rows) for role in value}
        else:
            merged[key] = statistics.median(row[key] for row in rows) if isinstance(value, (int, float)) else value
    return merged
