"""`python -m benchmarks.gpu_check.pack`: what a machine with a GPU and no network needs, in pieces that can be carried.

Writes `out/gpu_check/wheels/NN/` (wheels for that machine's Python, cut into pieces, with checksums) and `out/gpu_check/kit`
(bundles). There, put the contents of all wheel folders into one and pass it as --wheels. Needs the network (package
registries) and the `export` extra.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click

from .environment import ROOT, SUMS, split, write_sums
from .models import SHAPES, TRAINED, make_shape, make_trained

OUT = ROOT / "out" / "gpu_check"
WHEELS = (
    "onnxruntime-gpu",
    "tensorrt-rtx-cu13-bindings",
    "tensorrt-rtx-cu13-libs",
    "cuda-bindings",
    "cuda-pathfinder",
    "onnx-ir",
    "ml-dtypes",
    "msgspec",
    "tokenizers",
    "pillow",
    "psutil",
    "click",
    "rich",
    "markdown-it-py",
    "mdurl",
    "pygments",
    "jinja2",
    "markupsafe",
    "setuptools",
)
"""What the check needs there besides torch, transformers, onnx and numpy, which the machine has."""
SOURCES = ("tensorrt-rtx-cu13",)
"""Packages that are published as sources alone; their wheels, which hold Python only, are made here."""
CARRIED = ("smolvlm-256m", "smolvlm-2b")
_CONSTRAINTS = ROOT / "constraints.txt"


@click.command()
@click.option("--python", default="312", show_default=True, help="Python version of the machine with the GPU.")
@click.option("--platform", default="manylinux_2_28_x86_64", show_default=True)
@click.option("--piece-mib", type=click.IntRange(1), default=60, show_default=True, help="Largest piece, and largest folder.")
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
@click.option("--part", "parts", type=click.Choice(["wheels", "trained", *SHAPES]), multiple=True, help="Only this (repeatable).")
def main(python: str, platform: str, piece_mib: int, out: Path, parts: tuple[str, ...]) -> None:
    """Download, cut and export everything that is carried to the machine with the GPU."""
    wanted = parts or ("wheels", "trained", *CARRIED)
    if "wheels" in wanted:
        shutil.rmtree(out / "wheels", ignore_errors=True)
        found = download(out / "downloads", python, platform)
        for folder in cut(found, out / "wheels", piece_mib << 20):
            click.echo(f"{sum(file.stat().st_size for file in folder.iterdir()) / 2**20:6.1f} MiB  {folder}")
    if "trained" in wanted:
        for name in TRAINED:
            make_trained(name, out / "kit" / "trained")
            click.echo(f"{out / 'kit' / 'trained' / name}.vlm")
    for name in [name for name in SHAPES if name in wanted]:
        shutil.rmtree(out / "kit" / "shapes" / f"{name}.vlm", ignore_errors=True)
        make_shape(name, out / "kit" / "shapes")
        click.echo(f"{out / 'kit' / 'shapes' / name}.vlm")


def download(
    folder: Path, python: str, platform: str, wheels: tuple[str, ...] = WHEELS, sources: tuple[str, ...] = SOURCES
) -> list[Path]:
    """Wheels by name for another Python, without what they depend on. Raises SystemExit with pip's words."""
    shutil.rmtree(folder, ignore_errors=True)
    platforms = [platform, "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command += ["--python-version", python, *(word for name in platforms for word in ("--platform", name))]
    done = subprocess.run([*command, "--constraint", str(_CONSTRAINTS), *wheels], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"pip download failed: {done.stderr[-1500:]}")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    done = subprocess.run([*command, "--constraint", str(_CONSTRAINTS), *sources], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"pip wheel failed: {done.stderr[-1500:]}")
    return sorted(folder.glob("*.whl"))


def cut(wheels: list[Path], folder: Path, size: int) -> list[Path]:
    """Wheels and pieces of wheels in numbered folders of at most `size` bytes each; the last one has the checksums too."""
    scratch = folder / "all"
    pieces = [piece for wheel in wheels for piece in split(wheel, scratch, size)]
    sums = scratch / SUMS
    write_sums(wheels, sums)
    folders: list[Path] = []
    room = 0
    for piece in [*sorted(pieces, key=lambda file: (-file.stat().st_size, file.name)), sums]:
        needed = piece.stat().st_size
        if needed > room:
            folders.append(folder / f"{len(folders):02}")
            folders[-1].mkdir()
            room = size
        piece.rename(folders[-1] / piece.name)
        room -= needed
    scratch.rmdir()
    return folders


if __name__ == "__main__":
    main()
