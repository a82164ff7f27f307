"""The whole check, within a time budget: what `python -m benchmarks.gpu_check` does once its environment stands."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .environment import ROOT
from .plan import Facts, Step, chosen, on_this_machine, plan
from .report import save
from .work import MARK

OUT = ROOT / "out" / "gpu_check"
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
Row = dict[str, Any]


@click.command()
@click.option("--wheels", type=click.Path(exists=True, file_okay=False, path_type=Path), help="What pack.py made, carried here.")
@click.option("--kit", type=click.Path(path_type=Path), default=OUT / "kit", show_default=True, help="Bundles that pack.py made.")
@click.option("--minutes", type=click.FloatRange(min=0.1), default=8.0, show_default=True, help="Time for everything together.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the findings [default: benchmarks/results/gpu].")
@click.option("--only", multiple=True, help="Steps by name, with * (repeatable); what they need is done too.")
@click.option("--cpu", is_flag=True, help="The same flow on the CPU provider, with a tiny model: proves the script, not a GPU.")
@click.option("--dry-run", is_flag=True, help="Print the plan and do nothing.")
@click.option("--work", type=click.Path(path_type=Path), default=OUT / "work", show_default=True, help="Scratch folder.")
@click.option("--prepared", hidden=True, default="{}", help="What __main__ did before, as JSON.")
def main(
    wheels: Path | None,
    kit: Path,
    minutes: float,
    out: Path | None,
    only: tuple[str, ...],
    cpu: bool,
    dry_run: bool,
    work: Path,
    prepared: str,
) -> None:
    """Parity and speed of every engine kind that this machine's GPU supports, into JSON and Markdown."""
    out = out or (OUT / "cpu" if cpu else RESULTS)
    trained = [path.stem for path in sorted((kit / "trained").glob("*.vlm"))] or None
    steps = chosen(plan(kit, work, cpu=cpu, trained=trained), only)
    if dry_run:
        show(steps, minutes)
        return
    if not (kit / "trained").is_dir():
        raise click.UsageError(f"{kit} has no bundles: make it with `python -m benchmarks.gpu_check.pack`, and carry it here.")
    for part in ("trained", "shapes"):
        shutil.rmtree(work / part, ignore_errors=True)
        shutil.copytree(kit / part, work / part)
    before: Row = {"began": time.time(), "seconds": 0.0, "installed": [], "fault": "", **json.loads(prepared)}
    said = before["fault"] or ", ".join(before["installed"])
    rows = [_row("environment", "environment", "failed" if before["fault"] else "ok", before["seconds"], message=said)]
    _say(rows[-1])
    document = {
        "mode": "cpu" if cpu else "gpu",
        "command": f"python -m benchmarks.gpu_check {' '.join(_typed(sys.argv[1:]))}".strip(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "minutes": minutes,
        "steps": rows,
    }
    facts: Facts = {}
    name = "cpu" if cpu else "gpu"
    for step in steps:
        row = take(step, rows, facts, sys.executable, before["began"] + 60 * minutes - time.time())
        rows.append(row)
        _say(row)
        if step.name == "machine" and row.get("result"):
            facts = row["result"]
            name = re.sub(r"[^a-z0-9]+", "-", str(facts["gpu"]).lower()).strip("-")
        save(out, name, document, kit, work)  # after every step: a run that is cut off has said what it knows
    click.echo(f"{out / name}.json and .md")
    if not any(row["state"] == "ok" for row in rows[1:]):
        raise SystemExit("no step succeeded")


def take(step: Step, rows: Sequence[Row], facts: Facts, python: str, left_s: float) -> Row:
    """Runs one step, or says why not."""
    done = {row["name"]: row["state"] for row in rows}
    if reason := step.without(facts):
        return _row(step.name, step.work, "left out", 0, message=reason)
    for needed in step.needs:
        if done.get(needed) != "ok":
            return _row(step.name, step.work, "left out", 0, message=f"'{needed}' did not succeed")
    if left_s < step.least_s:
        return _row(step.name, step.work, "left out", 0, message=f"the time is used up ({max(left_s, 0):.0f} s left)")
    limit = min(step.limit_s, left_s)
    return run(step, on_this_machine(step, facts), python, limit)


def run(step: Step, options: dict[str, Any], python: str, limit_s: float) -> Row:
    """One step in a process group of its own, which is ended when it runs past its limit."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **step.environment}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "runtimes"), os.environ.get("PYTHONPATH", "")])
    command = [python, "-m", "benchmarks.gpu_check.work", step.work, json.dumps(options)]
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, start_new_session=True
    )
    try:
        said, complained = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, complained = process.communicate()
        message = f"ran past its limit of {limit_s:.0f} s: {_last_words(complained)}"
        return _row(step.name, step.work, "failed", time.monotonic() - began, message=message)
    seconds = time.monotonic() - began
    lines = [line for line in said.splitlines() if line.startswith(MARK)]
    if process.returncode != 0 or not lines:
        message = _last_words(complained or said) or f"ended with {process.returncode}"
        return _row(step.name, step.work, "failed", seconds, message=message)
    return _row(step.name, step.work, "ok", seconds, result=json.loads(lines[-1].removeprefix(MARK)))


def show(steps: Sequence[Step], minutes: float) -> None:
    """The plan as a table."""
    for step in steps:
        click.echo(f"{step.limit_s:5.0f} s  {step.name}: {step.about}")
    whole = sum(step.limit_s for step in steps)
    click.echo(f"{whole:5.0f} s  if every step took all it may; what {minutes:g} minutes do not hold is left out")


def _typed(arguments: Sequence[str]) -> list[str]:
    """The command line as it was typed, without what __main__ added."""
    return list(arguments[: arguments.index("--prepared")] if "--prepared" in arguments else arguments)


def _row(name: str, work: str, state: str, seconds: float, **more: Any) -> Row:
    return {"name": name, "work": work, "state": state, "seconds": round(seconds, 2), **more}


def _say(row: Row) -> None:
    found = row.get("message") or json.dumps(row.get("result", ""))
    click.echo(f"{row['seconds']:6.1f} s  {row['state']:8}  {row['name']}  {found[:200]}")


def _last_words(text: str) -> str:
    return " ".join(text.split())[-600:]


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or "unknown (no git here)"


if __name__ == "__main__":
    main()
