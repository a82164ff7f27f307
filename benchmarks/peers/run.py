"""Runs other programs: their output goes to a log while they run, and what went wrong becomes one line."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_MESSAGE = re.compile(r"^(ERROR: |error: |[\w.]+(Error|Exception|Exit|Interrupt)\b)")


class PeerError(RuntimeError):
    """A peer could not be installed, prepared or run; the message is one line."""


def first_line(output: str, otherwise: str) -> str:
    """What a failed process says is wrong: the last exception's line, or pip's first ERROR, or its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = [line for line in lines if _MESSAGE.match(line)]
    pip = [line for line in said if line.startswith("ERROR: ")]
    found = (pip[:1] or said[-1:] or lines[-1:] or [otherwise])[0]
    return found.replace("|", "/")[:200]


def run(command: list[str], log: Path, what: str, timeout: float | None = None, **environment: str) -> str:
    """Runs a command in the project's root; returns all that it says.

    That goes to `log` while it comes, so that a compilation can be followed there. Raises PeerError with one line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w+") as output:
        output.write(f"{' '.join(command)}\n")
        output.flush()
        begin = output.tell()
        settings = {**os.environ, **environment}
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=timeout, env=settings, check=False
            )
        except subprocess.TimeoutExpired:
            raise PeerError(f"{what}: still running after {timeout:.0f} s") from None
        output.seek(begin)
        text = output.read()
        output.write(f"\nexit {done.returncode}\n")
    if done.returncode != 0:
        signal = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise PeerError(f"{what}: {first_line(text, signal)}")
    return text
