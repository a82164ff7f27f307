"""Engine files of a build: written so that a loss of power leaves a whole one or none, found by GPU, checked before use."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from vlm_edge_runtime.errors import BundleError, TargetError

from .manifest import Build, EngineEntry, FileRef, GraphEntry, Manifest
from .writer import update_manifest

ENGINES = "engines"
_PARTIAL = ".partial"
_CHUNK = 16 << 20


def engine_folder(bundle: str | Path, build: str) -> Path:
    """Where a build's engines lie."""
    return Path(bundle) / "builds" / build / ENGINES


def graph_digest(entry: GraphEntry) -> str:
    """SHA-256 over a graph's files, by the hashes that the manifest has of them: what an engine was compiled from."""
    files = [entry.model.sha256, *(ref.sha256 for ref in entry.data)]
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


def write_engine(bundle: str | Path, build: str, name: str, data: memoryview) -> FileRef:
    """Writes `builds/BUILD/engines/NAME` whole or not at all; an older engine of that name is taken out of the manifest first.

    It is flushed to the disk before it gets its name. Record it with `record_engine`. Raises OSError (a full disk).
    """
    folder = engine_folder(bundle, build)
    folder.mkdir(parents=True, exist_ok=True)
    file = f"builds/{build}/{ENGINES}/{name}"
    forget_engines(bundle, build, {file})
    digest = hashlib.sha256()
    partial = folder / f".{name}.{os.getpid()}{_PARTIAL}"
    try:
        with partial.open("wb") as stream:
            for start in range(0, len(data), _CHUNK):
                part = data[start : start + _CHUNK]
                digest.update(part)
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(folder / name)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(folder)
    return FileRef(file=file, sha256=digest.hexdigest(), bytes=len(data))


def record_engine(bundle: str | Path, build: str, entry: EngineEntry) -> None:
    """Puts a written engine into the manifest, in place of those of the same graph that run on none but its GPUs."""

    def change(manifest: Manifest) -> None:
        made = _build(manifest, bundle, build)
        made.engines = [one for one in made.engines if not (one.graph == entry.graph and set(one.sm) <= set(entry.sm))] + [entry]

    update_manifest(bundle, change)


def forget_engines(bundle: str | Path, build: str, files: Iterable[str]) -> None:
    """Takes engines out of the manifest, by file; the files stay."""
    gone = set(files)

    def change(manifest: Manifest) -> None:
        made = _build(manifest, bundle, build)
        made.engines = [one for one in made.engines if one.file.file not in gone]

    update_manifest(bundle, change)


def sweep_engines(bundle: str | Path, build: Build) -> None:
    """Removes what interrupted builds left in a build's folder of engines: half-written files, engines that nobody recorded.

    The half-written file of a process that is still at work stays.
    """
    folder = engine_folder(bundle, build.name)
    if not folder.is_dir():
        return
    known = {Path(one.file.file).name for one in build.engines}
    for path in folder.iterdir():
        if path.name.endswith(_PARTIAL):
            if not _alive(path.name.removesuffix(_PARTIAL).rpartition(".")[2]):
                path.unlink(missing_ok=True)
        elif path.suffix == ".engine" and path.name not in known:
            path.unlink(missing_ok=True)


def find_engine(build: Build, graph: str, *, sm: int, where: str | Path) -> EngineEntry:
    """The newest engine of one of a build's graphs for a GPU of compute capability `sm` (86 is 8.6). `where`: the bundle, for

    messages.
    Raises TargetError when there is none (with those there are, and what to do) or when its graph is not the one it was compiled
    from.
    """
    of_graph = [one for one in build.engines if one.graph == graph]
    found = next((one for one in reversed(of_graph) if sm in one.sm), None)
    again = f"run `vlm-edge build {where} --target {build.target}"
    again += "`" if build.name == build.target else f" --name {build.name}`"
    if found is None:
        made = sorted({one for entry in of_graph for one in entry.sm})
        there = f"its engines are for SM {', '.join(map(str, made))}" if made else "it has no engine of it yet"
        raise TargetError(f"build '{build.name}' of {where} cannot run {graph} on SM {sm}: {there}; {again} there.")
    entry = build.graphs.get(graph)
    if entry is not None and found.graph_sha256 != graph_digest(entry):
        raise TargetError(f"{found.file.file} of {where} was compiled from another {graph}.onnx than the build has now; {again}.")
    return found


def _build(manifest: Manifest, bundle: str | Path, name: str) -> Build:
    if name not in manifest.builds:
        raise BundleError(f"{bundle} has no build '{name}' any more; was it replaced meanwhile? Build it again.")
    return manifest.builds[name]


def _alive(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk when its folder is; not every file system lets a folder be synchronised."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
