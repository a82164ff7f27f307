"""Contenders in turn, round after round, each in a process of its own; and how quiet the machine was meanwhile.

A run may come in pieces: the journal keeps each row with its time, the state of the project and a fingerprint of the files that
were measured, and rows of other files than the newest are left out.
"""

from __future__ import annotations

import datetime
import hashlib
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
DISK_MB = 10.0
"""What a process may read from the disk before its cold start is called one that waited for it."""
TIMEOUT_S = 600.0
UNKNOWN_S = 90.0
"""What a contender is given in a run of limited time before it was ever timed."""
COMPILED = ("_native", "libllama", "libggml")
"""Libraries that are compiled here, and belong to what was measured."""
Row = dict[str, Any]


def used_cores(seconds: float = 1.0) -> float:
    """Cores' worth of processor time that others use just now (the load average would remember a minute that is over)."""
    before = _clock()
    time.sleep(seconds)
    after = _clock()
    return (after.busy - before.busy + after.steal - before.steal) / (after.at - before.at)


def busy(cores: int) -> str | None:
    """One sentence about a machine that is not quiet, or None."""
    used = used_cores()
    if used <= 0.1 * cores:
        return None
    wait = f"wait until they take less than {0.1 * cores:.2f}"
    return f"others use {used:.2f} of {cores} cores, so figures taken now are noise: {wait}"


@dataclass(slots=True, frozen=True)
class _Clock:
    at: float
    busy: float
    steal: float
    own: float
    disk: float


def _clock() -> _Clock:
    fields = [int(each) for each in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    tick = os.sysconf("SC_CLK_TCK")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = (sum(fields[:3]) + sum(fields[5:7])) / tick
    return _Clock(time.time(), taken, fields[7] / tick, used.ru_utime + used.ru_stime, used.ru_inblock * 512 / 1e6)


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
    around = {
        "wall_s": wall,
        "other_cpu": others,
        "steal": (after.steal - before.steal) / wall,
        "disk_mb": after.disk - before.disk,
    }
    compiled = [name for name in found.get("mapped", ()) if Path(name).name.startswith(COMPILED)]
    files = [*found["files"], *compiled]
    return {**found, **around, "measured": files, "artefact": fingerprint(files)}


def fingerprint(names: Sequence[str]) -> str:
    """Names, sizes and times of files and of what lies in folders, as a short hash."""
    found = [file for path in map(Path, names) for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    facts = [(str(file), (held := file.stat()).st_size, held.st_mtime_ns) for file in found if file.is_file()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def in_turn(contenders: Sequence[Contender], count: int) -> Iterator[tuple[int, Contender]]:
    """(round, contender); each round begins with another one, so that nobody always follows the same neighbour's heat."""
    for number in range(count):
        shift = number % max(len(contenders), 1)
        for contender in (*contenders[shift:], *contenders[:shift]):
            yield number, contender


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Journal:
    """Rows as they are measured, one JSON line each, so that a run can go on (`--resume`). `origin` goes into each."""

    def __init__(self, path: Path, settings: Mapping[str, Any], resume: bool, origin: Mapping[str, Any] | None = None) -> None:
        self.path, self.settings = path, json.dumps(settings, sort_keys=True)
        self.origin = {"piece": _now(), **(origin or {})}
        self.rows: list[Row] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume and path.is_file():
            kept = [json.loads(line) for line in path.read_text().splitlines()]
            self.rows = [row for row in kept if row["settings"] == self.settings]
        if not resume:
            path.write_text("")

    def has(self, number: int, key: str) -> bool:
        """Whether that contender (or "limits") is done in that round, with the files that it has now."""
        rows = self.of(key)
        now = not rows or "measured" not in rows[-1] or fingerprint(rows[-1]["measured"]) == rows[-1]["artefact"]
        return now and any(row["round"] == number for row in rows)

    def add(self, number: int, key: str, row: Row) -> None:
        """Keeps a row, on disk at once."""
        kept = {**row, **self.origin, "at": _now(), "round": number, "key": key, "settings": self.settings}
        self.rows.append(kept)
        with self.path.open("a") as stream:
            stream.write(json.dumps(kept) + "\n")

    def of(self, key: str) -> list[Row]:
        """The rows of a contender that measured something, in order; of one measured with other files since, the newest."""
        found = [row for row in self.rows if row["key"] == key and "error" not in row]
        return [row for row in found if row.get("artefact") == found[-1].get("artefact")]

    def errors(self) -> dict[str, str]:
        """Contenders whose last try failed → why."""
        last = {row["key"]: row.get("error") for row in self.rows}
        return {key: error for key, error in last.items() if error is not None}

    def limits(self) -> list[limits.Limits]:
        """The machine's limits, as often as they were measured."""
        return [limits.Limits(row["read"], row["int8"], row["fp32"], row.get("bf16", 0.0)) for row in self.of("limits")]

    def expected_s(self, key: str) -> float | None:
        """How long a process of that contender took at most, if it ever ran."""
        return max((row["wall_s"] for row in self.rows if row["key"] == key and "wall_s" in row), default=None)


def run_rounds(
    contenders: Sequence[Contender],
    count: int,
    threads: int,
    pythons: Mapping[str, str],
    jobs: Mapping[str, Path],
    logs: Path,
    journal: Journal,
    tell: Callable[[str], None],
    until: float | None = None,
) -> tuple[dict[str, str], int]:
    """Everything `count` times in turn; what is in the journal already is left out. The limits are measured in each round again.

    A contender that fails is not tried again; the others go on. With `until` (of time.time()) none is begun that would last
    longer, but one. Returns contenders that failed → why, and how many measurements are left.
    """
    failed: dict[str, str] = {}
    meter: limits.Meter | None = None
    limited: set[int] = set()
    left = 0
    for number, contender in in_turn(contenders, count):
        if contender.key in failed or journal.has(number, contender.key):
            continue
        need = 1.1 * (journal.expected_s(contender.key) or UNKNOWN_S)
        if until is not None and limited and time.time() + need > until:
            left += 1
            continue
        if number not in limited:
            tell(f"round {number + 1}/{count}: the machine's limits")
            meter = meter or limits.Meter(threads)
            journal.add(number, "limits", asdict(meter.measure()))
            limited.add(number)
        tell(f"round {number + 1}/{count}: {contender.label}")
        _cached(jobs[contender.key])
        try:
            row = measured(pythons[contender.peer], contender, jobs[contender.key], logs / f"{contender.key}.log")
        except PeerError as error:
            failed[contender.key] = str(error)
            journal.add(number, contender.key, {"error": str(error)})
            tell(f"  {error}")
            continue
        jobs[contender.key].with_suffix(".files").write_text("\n".join([*row.pop("files"), *row.pop("mapped", ())]))
        journal.add(number, contender.key, row)
    return failed, left


def _cached(job: Path) -> None:
    """Reads the files and libraries that the contender told of before, so that a cold start does not wait for the disk."""
    hints = job.with_suffix(".files")
    if not hints.is_file():
        return
    for name in hints.read_text().splitlines():
        for file in [Path(name)] if Path(name).is_file() else Path(name).rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    while stream.read(1 << 24):
                        pass
