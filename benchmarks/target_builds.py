"""`python -m benchmarks.target_builds BUNDLE`: `vlm-edge build` for every GPU target in turn, as Markdown and JSON.

Engines where they can be compiled on this machine, checked graphs for the others; each build is the command that a user types,
in a process of its own, on a copy of the bundle that is removed again. A target that fails is said with the command's
last words, and the rest goes on.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from vlm_edge.targets import targets
from vlm_edge.targets.target import load_target
from vlm_edge_runtime.bundle.manifest import Build
from vlm_edge_runtime.bundle.reader import read_manifest

RESULTS = Path(__file__).parent / "results"
_HEAD = ("target", "build", "graphs", "engines", "SM", "on disk", "lowest cosine to portable", "time")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _agreement(build: Build) -> str:
    """The graph that differs most from its portable form."""
    cosines = {name: float(value) for name, value in build.options.items() if name.endswith(".cosine")}
    if not cosines:
        return "–"
    least = min(cosines, key=lambda name: cosines[name])
    return f"{least.removesuffix('.cosine')} {cosines[least]:.6f}"


def _one(source: Path, target: str) -> dict[str, Any]:
    """What the command made of one target, or its last words."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        bundle = Path(folder) / source.name
        shutil.copytree(source, bundle)
        return _built(bundle, target)


def _built(bundle: Path, target: str) -> dict[str, Any]:
    began = time.monotonic()
    command = [sys.executable, "-m", "vlm_edge", "build", str(bundle), "--target", target]
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = round(time.monotonic() - began)
    if done.returncode != 0:
        return {"failed": (done.stderr or done.stdout).strip()[-600:], "seconds": seconds}
    build = read_manifest(bundle).builds[target]
    return {
        "graphs": sorted(build.graphs),
        "engines": [
            {"role": one.role, "capacity": one.capacity, "sm": one.sm, "bytes": (bundle / one.file.file).stat().st_size}
            for one in build.engines
        ],
        "agreement": _agreement(build),
        "bytes": _size(bundle / "builds" / target),
        "said": [line.strip() for line in done.stdout.splitlines() if "engine" in line.lower()][-3:],
        "seconds": seconds,
    }


def _engineless(target: str) -> bool:
    """Whether ONNX Runtime runs the target's graphs, without engines."""
    return load_target(target).backend.startswith("ort-")


def _row(target: str, found: dict[str, Any]) -> tuple[str, ...]:
    time_taken = f"{found['seconds']} s"
    if "failed" in found:
        return (target, f"failed: {found['failed'].splitlines()[-1]}", *[""] * 5, time_taken)
    engines = found["engines"]
    sms = sorted({sm for one in engines for sm in one["sm"]})
    listed = ", ".join(
        f"{one['role']}{'' if one['capacity'] is None else ' c' + str(one['capacity'])} {one['bytes'] / 2**20:.0f} MiB"
        for one in engines
    )
    made = "engines" if engines else "checked graphs"
    there = listed or ("–" if _engineless(target) else "on the device")
    row = (target, made, str(len(found["graphs"])), there, ", ".join(map(str, sms)) or "–")
    return (*row, f"{found['bytes'] / 2**20:.0f} MiB", found["agreement"], time_taken)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--name", default="smolvlm_256m", show_default=True, help="What the results are called.")
@click.option("--target", "chosen", multiple=True, help="Only this target; may be given several times [every GPU target].")
def main(bundle: Path, name: str, chosen: tuple[str, ...]) -> None:
    """Build BUNDLE for every GPU target and keep what came of it in benchmarks/results."""
    path = RESULTS / f"{name}_builds.json"
    found: dict[str, Any] = json.loads(path.read_text())["targets"] if chosen and path.is_file() else {}
    names = [target.name for target in targets() if target.device is not None and (not chosen or target.name in chosen)]
    for target in names:
        found[target] = _one(bundle, target)
        click.echo(" | ".join(_row(target, found[target])))
        _write(path, name, read_manifest(bundle).source.architecture, found)


def _write(path: Path, name: str, model: str, found: dict[str, Any]) -> None:
    rows = [_HEAD, tuple("---" for _ in _HEAD), *(_row(target, found[target]) for target in sorted(found))]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    text = (
        f"# {model}, `vlm-edge build` for every GPU target\n\n"
        "Made on a machine without a GPU by `python -m benchmarks.target_builds BUNDLE`: engines where TensorRT-RTX compiles for "
        "a GPU that is not there, checked graphs for targets whose engines are compiled on the device by the same command. Times "
        "are of a machine that was busy with other work.\n\n"
    )
    path.with_suffix(".md").write_text(text + "\n".join(lines) + "\n")
    path.write_text(json.dumps({"model": model, "targets": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
