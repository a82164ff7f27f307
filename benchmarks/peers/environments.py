"""A peer's own environment: made by venv, filled by pip from requirements/PEER.txt, made anew when that file changes."""

from __future__ import annotations

import sys
from pathlib import Path

from . import llama_build
from .contenders import OWN_ENVIRONMENT
from .run import ROOT, PeerError, first_line, run

__all__ = ["PEERS", "ROOT", "PeerError", "first_line", "install", "python_of", "ready", "run"]
PEERS = (ROOT / "out" / "peers").resolve()
REQUIREMENTS = Path(__file__).parent / "requirements"
UNWANTED = {"openvino_genai": ("torchvision",)}
"""What pip brings along and must go: PyPI's torchvision does not load beside PyTorch's CPU build, and importing it fails."""
_COMPILE = "import compileall, sysconfig; compileall.compile_dir(sysconfig.get_path('purelib'), quiet=2, workers=0)"
"""As pip would, on all cores; templates and files of other versions of Python that do not compile are passed over."""


def python_of(peer: str, log: Path) -> str:
    """The interpreter of a peer's environment, which is made where it is missing or stale. Raises PeerError."""
    if peer not in OWN_ENVIRONMENT:
        return sys.executable
    return install(peer, REQUIREMENTS / f"{peer}.txt", PEERS / peer / "env", log)


def ready(peer: str) -> str:
    """The interpreter of a peer's environment that is there already, as it should be. Raises PeerError."""
    if peer not in OWN_ENVIRONMENT:
        return sys.executable
    folder, wanted = PEERS / peer / "env", REQUIREMENTS / f"{peer}.txt"
    stamp = folder / "installed.txt"
    if not (folder / "compiled.txt").is_file() or not stamp.is_file() or stamp.read_text() != wanted.read_text():
        raise PeerError(f"the environment of {peer} in {folder} is missing or of other versions: run with --prepare-only first")
    return str(folder / "bin" / "python")


def install(peer: str, requirements: Path, folder: Path, log: Path) -> str:
    """Makes `folder` an environment with `requirements`; does nothing when it is one. Raises PeerError."""
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = requirements.read_text()
    if stamp.is_file() and stamp.read_text() == wanted:
        _compile(peer, python, log)
        return str(python)
    stamp.unlink(missing_ok=True)
    make = [sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder)]
    fill = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile", "-r", str(requirements)]
    drop = [sys.executable, "-m", "pip", "--python", str(python), "uninstall", "--quiet", "--yes", *UNWANTED.get(peer, ())]
    for command in (make, fill, drop) if peer in UNWANTED else (make, fill):
        run(command, log, f"{peer} cannot be installed")
    if peer == "llama_cpp":
        llama_build.build(sys.executable, str(python), folder.parent, log)
    stamp.write_text(wanted)
    _compile(peer, python, log)
    return str(python)


def _compile(peer: str, python: Path, log: Path) -> None:
    """Compiles what is installed, once: a cold start must not, where PYTHONDONTWRITEBYTECODE keeps it from being stored."""
    stamp = python.parents[1] / "compiled.txt"
    if not stamp.is_file():
        run([str(python), "-c", _COMPILE], log, f"the Python files of {peer} cannot be compiled")
        stamp.touch()
