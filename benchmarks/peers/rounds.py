"""Contenders in turn, round after round, each in a process of its own; and how quiet the machine was meanwhile."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import limits
from .contenders import Contender
from .environments import PeerError, run
from .worker import MARK

QUIET_SHARE = 0.10
"""Cores' worth of other processes (or of the hypervisor) beyond which a round is called disturbed."""
TIMEOUT_S = 600.0
Row = dict[str, Any]


def load_average() -> float:
    """Processes that ran or waited for a core over the last minute."""
    return os.getloadavg()[0]


def busy(cores: int) -> str | None:
    """One sentence about a machine that is not quiet, or None."""
    load = load_average()
    if load <= 0.25 * cores:
        return None
    wait = f"wait until it is below {0.25 * cores:.2f}"
    return f"the load average is {load:.2f} on {cores} cores, so figures taken now are noise: {wait}"


@dataclass(slots=True, frozen=True)
class _Clock:
    at: float
    busy: float
    steal: float
    own: float


def _clock() -> _Clock:
    fields = [int(each) for each in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    tick = os.sysconf("SC_CLK_TCK")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return _Clock(time.time(), (sum(fields[:3]) + sum(fields[5:7])) / tick, fields[7] / tick, used.ru_utime + used.ru_stime)


def measured(python: str, contender: Contender, job: Path, log: Path) -> Row:
    """One process of one contender. Raises PeerError."""
    before = _clock()
    command = [python, "-m", f"benchmarks.peers.{contender.peer}", "measure", str(job)]
    threads = str(json.loads(job.read_text())["threads"])
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": threads}
    output = run(command, log, contender.label, TIMEOUT_S, BENCH_BEGAN=repr(time.time()), **environment)
    after = _clock()
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    if not lines:
        raise PeerError(f"{contender.label}: the process ended without a result")
    wall = after.at - before.at
    others = max(0.0, (after.busy - before.busy) - (after.own - before.own)) / wall
    found: Row = json.loads(lines[-1].removeprefix(MARK))
    return {**found, "wall_s": wall, "other_cpu": others, "steal": (after.steal - before.steal) / wall}


def in_turn(contenders: Sequence[Contender], count: int) -> Iterator[tuple[int, Contender]]:
    """(round, contender); each round begins with another one, so that nobody always follows the same neighbour's heat."""
    for number in range(count):
        shift = number % max(len(contenders), 1)
        for contender in (*contenders[shift:], *contenders[:shift]):
            yield number, contender


class Journal:
    """Rows as they are measured, one JSON line each, so that an interrupted run can go on (`--resume`)."""

    def __init__(self, path: Path, settings: Mapping[str, Any], resume: bool) -> None:
        self.path, self.settings = path, json.dumps(settings, sort_keys=True)
        self.rows: list[Row] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume and path.is_file():
            kept = [json.loads(line) for line in path.read_text().splitlines()]
            self.rows = [row for row in kept if row["settings"] == self.settings]
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def has(self, number: int, key: str) -> bool:
        """Whether that contender (or "limits") is done in that round."""
        return any(row["round"] == number and row["key"] == key for row in self.rows)

    def add(self, number: int, key: str, row: Row) -> None:
        """Keeps a row, on disk at once."""
        kept = {**row, "round": number, "key": key, "settings": self.settings}
        self.rows.append(kept)
        with self.path.open("a") as stream:
            stream.write(json.dumps(kept) + "\n")

    def of(self, key: str) -> list[Row]:
        """The rows of a contender that measured something, in order."""
        return [row for row in self.rows if row["key"] == key and "error" not in row]

    def limits(self) -> list[limits.Limits]:
        """The machine's limits, round by round."""
        return [limits.Limits(row["read"], row["int8"], row["fp32"]) for row in self.of("limits")]


def run_rounds(
    contenders: Sequence[Contender],
    count: int,
    threads: int,
    pythons: Mapping[str, str],
    jobs: Mapping[str, Path],
    logs: Path,
    journal: Journal,
    tell: Callable[[str], None],
) -> dict[str, str]:
    """Everything `count` times in turn; what is in the journal already is left out. Returns contenders that failed → why.

    A contender that fails is not tried again; the others go on.
    """
    failed: dict[str, str] = {}
    meter: limits.Meter | None = None
    for number, contender in in_turn(contenders, count):
        if not journal.has(number, "limits"):
            tell(f"round {number + 1}/{count}: the machine's limits")
            meter = meter or limits.Meter(threads)
            journal.add(number, "limits", asdict(meter.measure()))
        if contender.key in failed or journal.has(number, contender.key):
            continue
        tell(f"round {number + 1}/{count}: {contender.label}")
        _cached(jobs[contender.key])
        try:
            row = measured(pythons[contender.peer], contender, jobs[contender.key], logs / f"{contender.key}.log")
        except PeerError as error:
            failed[contender.key] = str(error)
            tell(f"  {error}")
            continue
        jobs[contender.key].with_suffix(".files").write_text("\n".join(row.pop("files")))
        journal.add(number, contender.key, row)
    return failed


def _cached(job: Path) -> None:
    """Reads the files that the contender told of in an earlier round, so that a cold start never waits for the disk."""
    hints = job.with_suffix(".files")
    if not hints.is_file():
        return
    for name in hints.read_text().splitlines():
        for file in [Path(name)] if Path(name).is_file() else Path(name).rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    while stream.read(1 << 24):
                        pass
