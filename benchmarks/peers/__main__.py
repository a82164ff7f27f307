"""`python -m benchmarks.peers`: prepares the model and the peers, measures in turn, writes JSON, Markdown and a picture."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console

from . import environments, limits, models, report, rounds, scenario, shape
from .contenders import Contender, chosen
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


def prepare(
    model: models.Model, those: Sequence[Contender], tiles: int, runs: int, threads: int, short: bool, rebuild: bool
) -> Any:
    """Model, environments, artefacts. Returns the shared job, interpreters, job files, and contenders that failed → why."""
    logs = model.folder / "logs"
    bundle = model.folder / f"{model.name}.vlm"
    with console.status("the comparison model"):
        models.make(model)
        derived: dict[str, Any] = models.derive(model)
    first = next((one for one in those if one.ours), chosen("ours-int4")[0])  # its tokenizer and image rules make the prompts
    mine = [one for one in those if one.ours] or [first]
    own = {**derived, "checkpoint": str(model.checkpoint), "bundle": str(bundle), "python": sys.executable}
    failed: dict[str, str] = {}
    for one in mine:
        path = scenario.write_job({**own, "tiles": tiles, "rebuild": rebuild}, "ours", one.variant, model)
        try:
            _prepare(one, path, sys.executable, logs)
        except environments.PeerError as error:
            failed[one.key] = str(error)
            console.print(f"[yellow]{one.label}[/]: {error}")
    if first.key in failed:
        raise click.ClickException(f"{failed[first.key]} (its tokenizer and image rules make the prompts of all).")
    with console.status("prompts"):
        job = scenario.make_job(model, bundle, first.variant, tiles, runs, threads, short, derived)
    pythons: dict[str, str] = {}
    jobs: dict[str, Path] = {}
    for one in those:
        jobs[one.key] = scenario.write_job(job, one.peer, one.variant, model)
        try:
            if one.peer not in pythons:
                with console.status(f"environment of {one.peer} (built from source where PyPI has no wheel)"):
                    pythons[one.peer] = environments.python_of(one.peer, environments.PEERS / one.peer / "install.log")
            if not one.ours:
                _prepare(one, jobs[one.key], pythons[one.peer], logs)
        except environments.PeerError as error:
            failed[one.key] = str(error)
            console.print(f"[yellow]{one.label}[/]: {error}")
    return job, pythons, jobs, failed


def _prepare(one: Contender, job: Path, python: str, logs: Path) -> None:
    with console.status(f"artefacts of {one.label}"):
        command = [python, "-m", f"benchmarks.peers.{one.peer}", "prepare", str(job)]
        environments.run(command, logs / f"{one.key}-prepare.log", f"{one.label} cannot be prepared", HF_HUB_OFFLINE="1")


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
    allow_busy: bool,
    prepare_only: bool,
    rebuild: bool,
    keep: bool,
    out: Path | None,
) -> None:
    """vlm-edge beside transformers, OpenVINO, llama.cpp and onnxruntime-genai on a model of random weights.

    Every peer is installed in an environment of its own below out/peers (some GB on disk; llama.cpp is compiled), and
    gets the model in its own format: allow half an hour the first time. Then each contender runs in a process of its own,
    in turn, round after round. A peer that cannot be installed, converted or run is named with the reason, and the others
    go on.

    \b
    python -m benchmarks.peers --prepare-only             everything but the measuring
    python -m benchmarks.peers                            the table and the goals, one tile
    python -m benchmarks.peers --tiles 17 --rounds 2      time to the first token of a split picture
    python -m benchmarks.peers --model 2b                 a decoder of 1.5 B
    python -m benchmarks.peers --only ours,llama --quick  a look
    """
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
    warning = None if prepare_only else _quiet(cores, allow_busy)
    job, pythons, jobs, failed = prepare(model, those, split, runs, threads, quick, rebuild)
    if prepare_only:
        return
    settings = {"tiles": split, "runs": runs, "threads": threads, "quick": quick, "model": model.name}
    journal = rounds.Journal(model.folder / f"journal-{split}.jsonl", settings, resume)
    running = [one for one in those if one.key not in failed]
    try:
        failed |= rounds.run_rounds(running, count, threads, pythons, jobs, model.folder / "logs", journal, console.print)
    except RuntimeError as error:
        raise click.ClickException(str(error)) from None
    found = _document(model, those, failed, journal, job, threads, warning)
    show(found, console)
    if keep or out:
        for file in save(found, out or RESULTS / f"peers_{model.name}_{split}_tile{'s' * (split > 1)}"):
            console.print(f"saved: {file}")


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
    failed: Mapping[str, str],
    journal: rounds.Journal,
    job: Mapping[str, Any],
    threads: int,
    warning: str | None,
) -> dict[str, Any]:
    rows = {one.key: journal.of(one.key) for one in those}
    seen = journal.limits()
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
        "command": shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(threads),
        "rounds": max((len(own) for own in rows.values()), default=0),
        "warning": warning,
    }
    sizes = shape.read(model.checkpoint, (model.side, model.side))
    return report.document(rows, those, failed, limits.best(seen), sizes, facts, head)


if __name__ == "__main__":
    main()
