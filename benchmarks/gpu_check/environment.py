"""The environment of the check on a machine without a network: wheels joined and installed, the C extension built."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PART = re.compile(r"^(?P<wheel>.+\.whl)\.part(?P<number>\d{3})$")
SUMS = "SHA256SUMS"


class EnvironmentFault(RuntimeError):
    """What could not be set up, in a sentence."""


def split(wheel: Path, folder: Path, size: int) -> list[Path]:
    """Cuts a wheel into files of at most `size` bytes in `folder` (one file as it is when it is small enough)."""
    folder.mkdir(parents=True, exist_ok=True)
    if wheel.stat().st_size <= size:
        return [Path(shutil.copy2(wheel, folder / wheel.name))]
    made: list[Path] = []
    with wheel.open("rb") as stream:
        while data := stream.read(size):
            made.append(folder / f"{wheel.name}.part{len(made):03}")
            made[-1].write_bytes(data)
    return made


def join(folder: Path, target: Path) -> list[Path]:
    """Whole wheels of `folder`, those in parts joined into `target`, each checked against SHA256SUMS.

    Raises EnvironmentFault for a missing part or a wrong checksum.
    """
    sums = _sums(folder)
    parts: dict[str, dict[int, Path]] = {}
    found = []
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".whl":
            found.append(file)
        elif match := PART.match(file.name):
            parts.setdefault(match["wheel"], {})[int(match["number"])] = file
    target.mkdir(parents=True, exist_ok=True)
    for name, pieces in parts.items():
        missing = sorted(set(range(max(pieces) + 1)) - pieces.keys())
        if missing:
            raise EnvironmentFault(f"{folder}: part {missing[0]:03} of {name} is missing; carry all of them.")
        whole = target / name
        with whole.open("wb") as stream:
            for _, piece in sorted(pieces.items()):
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, stream, 1 << 22)
        found.append(whole)
    for file in found:
        if file.name not in sums:
            raise EnvironmentFault(f"{folder} has no checksum for {file.name} in a {SUMS} file: pack the wheels again.")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != sums[file.name]:
            raise EnvironmentFault(
                f"{file.name} has SHA-256 {digest[:16]}…, {SUMS} says {sums[file.name][:16]}…: carry it again."
            )
    for name in sums.keys() - {file.name for file in found}:
        raise EnvironmentFault(f"{folder} has no {name}, which {SUMS} names; carry all pieces.")
    return sorted(found)


def write_sums(wheels: list[Path], file: Path) -> None:
    """Checksums of whole wheels, as sha256sum writes them."""
    lines = [f"{hashlib.sha256(wheel.read_bytes()).hexdigest()}  {wheel.name}" for wheel in wheels]
    file.write_text("\n".join(lines) + "\n")


def prepare(wheels: Path | None, work: Path) -> tuple[str, list[str]]:
    """(the Python that steps run in, what was installed). Without wheels it is this one.

    With wheels: an environment of its own that sees this one's packages, with every wheel whose package is missing here (so
    onnxruntime-gpu comes before an `onnxruntime` that is there). Builds the C extension where it cannot be imported. Raises
    EnvironmentFault.
    """
    python, installed = sys.executable, []
    if wheels is not None:
        venv = work / "venv"
        _run([sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", str(venv)], "make an environment")
        python = str(venv / "bin" / "python")
        _see_packages_of_this(venv)
        chosen = [wheel for wheel in join(wheels, work / "wheels") if _wanted(wheel, python)]
        if chosen:
            command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
            _run([*command, *map(str, chosen)], "install the wheels")
        installed = [wheel.name for wheel in chosen]
    if (
        subprocess.run([python, "-c", "import vlm_edge_runtime._native"], capture_output=True, cwd=ROOT / "runtimes").returncode
        != 0
    ):
        _run([python, "setup.py", "--quiet", "build_ext", "--inplace"], "build the C extension")
        installed.append("vlm_edge_runtime._native (built here)")
    return python, installed


def _see_packages_of_this(venv: Path) -> None:
    """This interpreter may itself stand in an environment, whose packages `--system-site-packages` does not show."""
    (own,) = (venv / "lib").glob("python*/site-packages")
    folders = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    (own / "packages_of_the_machine.pth").write_text("".join(f"{folder}\n" for folder in folders))


def _wanted(wheel: Path, python: str) -> bool:
    """Whether the environment lacks this wheel's package. Older ones stay: what the machine has goes together."""
    name = wheel.name.split("-")[0].replace("_", "-")
    code = f"from importlib.metadata import version; version({name!r})"
    return subprocess.run([python, "-c", code], capture_output=True).returncode != 0


def _sums(folder: Path) -> dict[str, str]:
    found = {}
    for file in folder.rglob(SUMS):
        for line in file.read_text().splitlines():
            digest, _, name = line.partition("  ")
            found[name.strip()] = digest
    return found


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        words = " ".join((done.stderr or done.stdout).split())[-600:]
        raise EnvironmentFault(f"could not {what}: {words}")
