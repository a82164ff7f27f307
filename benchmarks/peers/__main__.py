"""`python -m benchmarks.peers`: prepares the model and the peers, measures in turn, writes JSON, Markdown and a picture."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console

from . import environments, models, report, rounds, scenario, shape
from .contenders import CONTENDERS, Contender, chosen
from .journal import Journal
from .prepare import Prepared, prepare, prepared
from .show import show

RESULTS = environments.ROOT / "benchmarks" / "results"
console = Console(highlight=False)


def machine(threads: int) -> str:
    """CPU, cores, memory, system: one line."""
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = next(
        (line.split(":")[1].strip() for line in facts.splitlines() if line.startswith("model name")), platform.processor()
    )
    flags = next((line.split() for line in facts.splitlines() if line.startswith("flags")), [])
    has = [one for one in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if one in flags]
    memory = psutil.virtual_memory().total / 2**30
    return f"{name}, {os.cpu_count()} cores ({', '.join(has)}), {memory:.0f} GiB, {threads} threads, {platform.platform()}"


def commit() -> str:
    """The commit, and whether the tree has changes."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=environments.ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    dirty = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + dirty


def save(found: Mapping[str, Any], stem: Path) -> list[Path]:
    """JSON, Markdown, and a picture where matplotlib is installed."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_suffix(".json"), stem.with_suffix(".md")]
    files[0].write_text(json.dumps(found, indent=2) + "\n")
    files[1].write_text(report.markdown(found))
    try:
        from .plot import draw

        draw(found, stem.with_suffix(".png"))
        files.append(stem.with_suffix(".png"))
    except ImportError:
        console.print("no picture: matplotlib is not installed (pip install 'vlm-edge[bench]')")
    return files


@click.command(context_settings={"max_content_width": 110})
@click.option(
    "--model", "name", default="256m", show_default=True, help="256m, 2b, or a folder with a SmolVLM or Qwen2-VL checkpoint."
)
@click.option(
    "--tiles", type=click.Choice(["1", "17"]), default="1", show_default=True, help="17: the picture split, as by default."
)
@click.option("--only", help="Contenders by the beginning of their key, as ours,llama.cpp-q4 (default: all).")
@click.option("--rounds", "count", type=click.IntRange(1), default=3, show_default=True, help="Processes per contender.")
@click.option(
    "--runs", type=click.IntRange(1), default=2, show_default=True, help="Timed answers per process (their median counts)."
)
@click.option("--threads", type=click.IntRange(1), help="Threads of every contender (default: the physical cores).")
@click.option("--quick", is_flag=True, help="One round of one run with short answers: does everything work?")
@click.option("--resume", is_flag=True, help="Keep what an interrupted run with the same options has measured.")
@click.option("--for", "seconds", type=click.FloatRange(1), help="Begin nothing that would end later; --resume goes on (exit 3).")
@click.option("--prepared", "ready", is_flag=True, help="Prepare nothing: measure what --prepare-only left, at once.")
@click.option("--report", "only_report", is_flag=True, help="Measure nothing: write the tables of what the journal holds.")
@click.option("--busy", "allow_busy", is_flag=True, help="Measure although the machine is busy; the tables say so.")
@click.option("--prepare-only", is_flag=True, help="Make the model, the environments and the artefacts; measure nothing.")
@click.option("--rebuild", is_flag=True, help="Build ours again, after a change of the compiler or the kernels.")
@click.option("--save/--no-save", "keep", default=True, show_default=True, help="Write benchmarks/results/peers_MODEL_TILES.*")
@click.option("--out", type=click.Path(path_type=Path), help="Write there instead: a path without its ending.")
def main(
    name: str,
    tiles: str,
    only: str | None,
    count: int,
    runs: int,
    threads: int | None,
    quick: bool,
    resume: bool,
    seconds: float | None,
    ready: bool,
    only_report: bool,
    allow_busy: bool,
    prepare_only: bool,
    rebuild: bool,
    keep: bool,
    out: Path | None,
) -> None:
    """vlm-edge beside transformers, OpenVINO, llama.cpp and onnxruntime-genai on a model of random weights.

    Every peer is installed in an environment of its own below out/peers (some GB on disk; llama.cpp is compiled), and
    gets the model in its own format: allow half an hour the first time. Then each contender runs in a process of its own,
    in turn, round after round, between two readings of the machine's limits. A peer that cannot be installed, converted or
    run is named with the reason, and the others go on.

    \b
    python -m benchmarks.peers --prepare-only             everything but the measuring
    python -m benchmarks.peers                            the table and the goals, one tile
    python -m benchmarks.peers --tiles 17 --rounds 2      time to the first token of a split picture
    python -m benchmarks.peers --model 2b                 a decoder of 1.5 B
    python -m benchmarks.peers --only ours,llama --quick  a look

    A long run can be taken in pieces, each as quiet as it can be had; the page says of when its figures are:

    \b
    python -m benchmarks.peers --model 2b --prepare-only
    python -m benchmarks.peers --model 2b --prepared --resume --for 200    again, until it does not exit with 3
    python -m benchmarks.peers --model 2b --report                         the tables of what there is
    """
    began = time.time()
    try:
        those, model = chosen(only), models.model_named(name)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    split = int(tiles)
    if split > 1 and model.one_tile is None:
        raise click.UsageError(f"--tiles {tiles}: {model.title} does not split pictures.")
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    threads = threads or cores
    count, runs = (1, 1) if quick else (count, runs)
    wanted: dict[str, Any] = {"tiles": split, "runs": runs, "threads": threads, "quick": quick}
    if prepare_only:
        prepare(model, those, wanted, rebuild, console)
        return
    warning = None if only_report else _quiet(cores, allow_busy)
    settings = {**wanted, "model": model.name}
    command = shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]])
    origin = {"commit": commit(), "command": command, "busy": warning}
    journal = Journal(model.folder / f"journal-{split}.jsonl", settings, resume or only_report, origin)
    for note in journal.notes:
        console.print(f"[yellow]{note}[/]")
    if only_report:
        those = tuple(one for one in CONTENDERS if journal.of(one.key) or one.key in journal.errors())
        if not those:
            raise click.ClickException(f"{journal.path} holds nothing of a run with these options.")
    prepare_now = not (ready or only_report)
    made = prepare(model, those, wanted, rebuild, console) if prepare_now else prepared(model, those, wanted, run=not only_report)
    journal.scenario = scenario.identity(made.job)
    if journal.others():
        console.print(f"[yellow]{journal.others()} rows of {journal.path} are of other prompts than now and are left out.[/]")
    left = 0
    if not only_report:
        running = [one for one in those if one.key not in made.failed]
        until = None if seconds is None else began + seconds
        logs = model.folder / "logs"
        try:
            failed, left = rounds.run_rounds(
                running, count, threads, made.pythons, made.jobs, logs, journal, console.print, until
            )
        except RuntimeError as error:
            raise click.ClickException(str(error)) from None
        made.failed |= failed
    if left:
        console.print(f"{left} measurements are left: give the same command again, with --resume.")
        sys.exit(3)
    found = _document(model, those, made, journal, threads)
    show(found, console)
    if keep or out:
        for path in save(found, out or RESULTS / f"peers_{model.name}_{split}_tile{'s' * (split > 1)}"):
            console.print(f"saved: {path}")


def _quiet(cores: int, allow_busy: bool) -> str | None:
    """Ends the command on a busy machine, or gives the warning that the tables carry."""
    said = rounds.busy(cores)
    if said is None:
        return None
    if not allow_busy:
        raise click.ClickException(f"{said}; or pass --busy, and the tables will say so.")
    console.print(f"[bold red]{said}[/]")
    return f"Taken on a busy machine: {said}."


def _document(
    model: models.Model,
    those: Sequence[Contender],
    made: Prepared,
    journal: Journal,
    threads: int,
) -> dict[str, Any]:
    job = made.job
    rows = {one.key: journal.of(one.key) for one in those}
    failed = {**journal.errors(), **made.failed}
    image_tokens = job["image"]["ids"].count(job["image"]["token_id"])
    facts = {
        "model": model.name,
        "tiles": job["tiles"],
        "lengths": dict(zip(("short", "long", "longest"), model.lengths, strict=True)),
        "new_tokens": job["new_tokens"],
        "image_tokens": image_tokens,
        "other_tokens": len(job["image"]["ids"]) - image_tokens,
    }
    head = {
        "title": f"{model.title}, {job['tiles']} tile{'s' * (job['tiles'] > 1)}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "`, `".join(sorted({row["command"] for own in rows.values() for row in own if "command" in row})),
        "commit": ", ".join(sorted({row["commit"] for own in rows.values() for row in own if row.get("commit")})) or commit(),
        "machine": machine(threads),
        "rounds": max((len(own) for own in rows.values()), default=0),
        "warning": next((row["busy"] for own in rows.values() for row in own if row.get("busy")), None),
    }
    sizes = shape.read(model.checkpoint, (model.side, model.side))
    return report.document(rows, those, failed, journal.limits(), sizes, facts, head)


if __name__ == "__main__":
    main()
