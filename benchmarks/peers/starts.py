"""Nobody's cold start waits for the disk: the files that a contender reads are read before each of its processes.

Which these are it says at the end of a process. Before the first one a start that is measured by nobody goes to the first token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .contenders import Contender
from .environments import PeerError, run
from .worker import MARK

TIMEOUT_S = 600.0
CHUNK = 1 << 24


def process(python: str, contender: Contender, what: str, job: Path, log: Path, **environment: str) -> dict[str, Any]:
    """One process of one contender (`what`: start or measure); what it found. Raises PeerError."""
    command = [python, "-m", f"benchmarks.peers.{contender.peer}", what, str(job)]
    threads = str(json.loads(job.read_text())["threads"])
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": threads}
    output = run(command, log, contender.label, TIMEOUT_S, **offline, **environment)
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    if not lines:
        raise PeerError(f"{contender.label}: the process ended without a result")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
    return found


def known(job: Path) -> bool:
    """Whether that contender has said which files it reads."""
    return _list(job).is_file()


def first(python: str, contender: Contender, job: Path, log: Path) -> None:
    """The start that nobody measures. Raises PeerError."""
    found = process(python, contender, "start", job, log)
    keep(job, [*found["files"], *found["mapped"]])


def keep(job: Path, files: Sequence[str]) -> None:
    """Writes down what a contender reads, beside what it was known to read: a first start knows most."""
    before = _list(job).read_text().splitlines() if known(job) else []
    now = set(files)
    kept = [name for name in before if Path(name).exists() and name not in now]
    _list(job).write_text("\n".join([*files, *kept]))


def cache(job: Path) -> None:
    """Reads what the contender will read, so that it is in memory."""
    for file in _files(job):
        with file.open("rb") as stream:
            while stream.read(CHUNK):
                pass


def _list(job: Path) -> Path:
    return job.with_suffix(".reads")


def _files(job: Path) -> Iterator[Path]:
    for path in map(Path, _list(job).read_text().splitlines() if known(job) else ()):
        yield from (file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
