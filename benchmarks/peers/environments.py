"""A peer's own environment: made by venv, filled by pip from requirements/PEER.txt, made anew when that file changes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from .contenders import OWN_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "out" / "peers"
REQUIREMENTS = Path(__file__).parent / "requirements"
UNWANTED = {"openvino_genai": ("torchvision",)}
"""What pip brings along and must go: PyPI's torchvision does not load beside PyTorch's CPU build, and importing it fails."""
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


def python_of(peer: str, log: Path) -> str:
    """The interpreter of a peer's environment, which is made where it is missing or stale. Raises PeerError."""
    if peer not in OWN_ENVIRONMENT:
        return sys.executable
    return install(peer, REQUIREMENTS / f"{peer}.txt", PEERS / peer / "env", log)


def install(peer: str, requirements: Path, folder: Path, log: Path) -> str:
    """Makes `folder` an environment with `requirements`; does nothing when it is one. Raises PeerError."""
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = requirements.read_text()
    if stamp.is_file() and stamp.read_text() == wanted:
        return str(python)
    stamp.unlink(missing_ok=True)
    make = [sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder)]
    fill = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile", "-r", str(requirements)]
    drop = [sys.executable, "-m", "pip", "--python", str(python), "uninstall", "--quiet", "--yes", *UNWANTED.get(peer, ())]
    for command in (make, fill, drop) if peer in UNWANTED else (make, fill):
        run(command, log, f"{peer} cannot be installed")
    stamp.write_text(wanted)
    return str(python)


def run(command: list[str], log: Path, what: str, timeout: float | None = None, **environment: str) -> str:
    """Runs a command in the project's root; its output goes to `log` too and comes back. Raises PeerError with one line."""
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}
        )
    except subprocess.TimeoutExpired:
        raise PeerError(f"{what}: still running after {timeout:.0f} s") from None
    log.write_text(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}\nexit {done.returncode}\n")
    if done.returncode != 0:
        signal = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise PeerError(f"{what}: {first_line(done.stderr + done.stdout, signal)}")
    return done.stdout
