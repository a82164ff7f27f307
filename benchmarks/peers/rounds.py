"""Contenders in turn, round after round, each in a process of its own; and how quiet the machine was meanwhile.

Directly before and after each process the machine's limits are read. A run may come in pieces: the journal (journal.py) keeps
each row with its time, the state of the project and fingerprints of what was measured.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import limits, starts
from .contenders import Contender
from .environments import PeerError
from .journal import Journal, fingerprint

QUIET_SHARE = 0.10
"""Cores' worth of other processes (or of the hypervisor) beyond which a round is called disturbed."""
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
    found: Row = starts.process(python, contender, "measure", job, log, BENCH_BEGAN=repr(time.time()))
    after = _clock()
    wall = after.at - before.at
    others = max(0.0, (after.busy - before.busy) - (after.own - before.own)) / wall
    around = {
        "wall_s": wall,
        "other_cpu": others,
        "steal": (after.steal - before.steal) / wall,
        "disk_mb": after.disk - before.disk,
    }
    libraries = [Path(name) for name in found.get("mapped", ()) if ".so" in Path(name).name]
    files = [*found["files"], *(str(file) for file in libraries if file.name.startswith(COMPILED))]
    return {**found, **around, "measured": files, "artefact": fingerprint(files)}


def in_turn(contenders: Sequence[Contender], count: int) -> Iterator[tuple[int, Contender]]:
    """(round, contender), so that nobody always begins and nobody always follows the same neighbour.

    Rows of a Williams design (E. J. Williams, 1949): over as many rounds as there are contenders, or twice as many where their
    number is odd, each follows each other one equally often.
    """
    size = len(contenders)
    places = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(size)]  # 0, 1, -1, 2, -2 …
    for number in range(count):
        order = [contenders[(place + number) % size] for place in places]
        yield from ((number, one) for one in (order if size % 2 == 0 or number // size % 2 == 0 else reversed(order)))


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
    """Everything `count` times in turn; what is in the journal already is left out. The limits are read beside each process.

    A contender that fails is not tried again; the others go on. With `until` (of time.time()) none is begun that would last
    longer, but one; and none of a later round, since a round's figures are held against each other and should lie near in time.
    Returns contenders that failed → why, and how many measurements are left.
    """
    failed: dict[str, str] = {}
    meter: limits.Meter | None = None
    left, unfinished = 0, count
    for number, contender in in_turn(contenders, count):
        key, job = contender.key, jobs[contender.key]
        if key in failed or journal.has(number, key):
            continue
        need = 1.1 * (journal.expected_s(key) or UNKNOWN_S)
        if until is not None and (number > unfinished or (meter is not None and time.time() + need > until)):
            left, unfinished = left + 1, min(unfinished, number)
            continue
        tell(f"round {number + 1}/{count}: {contender.label}")
        meter = meter or limits.Meter(threads)
        try:
            if not starts.known(job):
                starts.first(pythons[contender.peer], contender, job, logs / f"{key}-start.log")
            starts.cache(job)
            before = meter.measure()
            row = measured(pythons[contender.peer], contender, job, logs / f"{key}.log")
            after = meter.measure()
        except PeerError as error:
            failed[key] = str(error)
            journal.add(number, key, {"error": str(error)})
            tell(f"  {error}")
            continue
        starts.keep(job, [*row.pop("files"), *row.pop("mapped", ())])
        journal.add(number, key, {**row, "limits": [asdict(before), asdict(after)]})
    return failed, left
