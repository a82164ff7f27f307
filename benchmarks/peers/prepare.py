"""Model, environments and artefacts: made where missing, or taken as an earlier `--prepare-only` left them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from . import environments, models, scenario, starts
from .contenders import CONTENDERS, Contender, chosen


@dataclass(slots=True)
class Prepared:
    """`job`: what all contenders share. `pythons`: peer → interpreter. `jobs`: contender → file. `failed`: contender → why."""

    job: dict[str, Any]
    pythons: dict[str, str] = field(default_factory=dict)
    jobs: dict[str, Path] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def prepare(
    model: models.Model, those: Sequence[Contender], wanted: Mapping[str, Any], rebuild: bool, console: Console
) -> Prepared:
    """Makes everything. `wanted`: tiles, runs, threads, quick. Raises ClickException where no prompts can be made."""
    logs = model.folder / "logs"
    bundle = model.folder / f"{model.name}.vlm"
    with console.status("the comparison model"):
        models.make(model)
        derived: dict[str, Any] = models.derive(model)
    first = next((one for one in those if one.ours), chosen("ours-int4")[0])  # its tokenizer and image rules make the prompts
    mine = [one for one in those if one.ours] or [first]
    own = {**derived, "checkpoint": str(model.checkpoint), "bundle": str(bundle), "python": sys.executable}
    failed: dict[str, str] = {}

    def said(one: Contender, error: environments.PeerError) -> None:
        failed[one.key] = str(error)
        console.print(f"[yellow]{one.label}[/]: {error}")

    for one in mine:
        path = scenario.write_job({**own, "tiles": wanted["tiles"], "rebuild": rebuild}, "ours", one.variant, model)
        try:
            _artefacts(one, path, sys.executable, logs, console)
        except environments.PeerError as error:
            said(one, error)
    if first.key in failed:
        raise click.ClickException(f"{failed[first.key]} (its tokenizer and image rules make the prompts of all).")
    with console.status("prompts"):
        job = scenario.make_job(
            model, bundle, first.variant, wanted["tiles"], wanted["runs"], wanted["threads"], wanted["quick"], derived
        )
    made = Prepared(job, failed=failed)
    for one in mine:  # also one that was not asked for and only made the prompts: its job is whole again
        scenario.write_job(job, one.peer, one.variant, model)
    for one in those:
        made.jobs[one.key] = scenario.write_job(job, one.peer, one.variant, model)
        try:
            if one.peer not in made.pythons:
                with console.status(f"environment of {one.peer} (built from source where PyPI has no wheel)"):
                    log = environments.PEERS / one.peer / "install.log"
                    made.pythons[one.peer] = environments.python_of(one.peer, log)
            if not one.ours:
                _artefacts(one, made.jobs[one.key], made.pythons[one.peer], logs, console)
            if one.key not in failed and not starts.known(made.jobs[one.key]):
                with console.status(f"a first start of {one.label}, which nobody measures"):
                    starts.first(made.pythons[one.peer], one, made.jobs[one.key], logs / f"{one.key}-start.log")
        except environments.PeerError as error:
            said(one, error)
    stale = _stale(job, [one for one in CONTENDERS if one not in those], model)
    if stale:
        console.print(
            f"[yellow]{', '.join(stale)}: prepared for other prompts; --prepare-only is needed before these are measured.[/]"
        )
    return made


def _stale(job: Mapping[str, Any], others: Sequence[Contender], model: models.Model) -> list[str]:
    """The contenders whose job, where there is one, is of other prompts, another picture or other settings."""
    paths = {one.label: scenario.job_path(one.peer, one.variant, job["tiles"], model) for one in others}
    now = scenario.identity(dict(job))
    return [label for label, path in paths.items() if path.is_file() and scenario.identity(json.loads(path.read_text())) != now]


def prepared(model: models.Model, those: Sequence[Contender], wanted: Mapping[str, Any], run: bool) -> Prepared:
    """Takes the jobs that are there, so that a piece of a run begins at once. `wanted`: tiles, runs, threads, quick; `run`:

    whether the environments will be used, and must be as they should.
    Raises ClickException where a job is missing, was written for another run, or not for the same prompts as the newest one.
    """
    found, newest = Prepared({}), 0
    for one in those:
        path = scenario.job_path(one.peer, one.variant, wanted["tiles"], model)
        again = f"run the same command with --prepare-only instead of --prepared first ({path.name})"
        if not path.is_file():
            raise click.ClickException(f"{one.label} is not prepared: {again}.")
        job: dict[str, Any] = json.loads(path.read_text())
        differing = [name for name in ("tiles", "runs", "threads", "quick") if job.get(name, False) != wanted[name]]
        if differing:
            raise click.ClickException(f"{one.label} is prepared with other {', '.join(differing)}: {again}.")
        found.jobs[one.key] = path
        if (written := path.stat().st_mtime_ns) >= newest:
            found.job, newest = job, written
        if not run:
            continue
        try:
            found.pythons[one.peer] = environments.ready(one.peer)
        except environments.PeerError as error:
            found.failed[one.key] = str(error)
    stale = _stale(found.job, those, model) if run else []
    if stale:
        raise click.ClickException(
            f"{', '.join(stale)}: prepared for other prompts than the newest job; run the same command with --prepare-only first."
        )
    return found


def _artefacts(one: Contender, job: Path, python: str, logs: Path, console: Console) -> None:
    with console.status(f"artefacts of {one.label}"):
        command = [python, "-m", f"benchmarks.peers.{one.peer}", "prepare", str(job)]
        environments.run(command, logs / f"{one.key}-prepare.log", f"{one.label} cannot be prepared", HF_HUB_OFFLINE="1")
