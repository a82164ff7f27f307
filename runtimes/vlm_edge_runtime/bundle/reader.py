"""Opening a bundle: the manifest is validated, and every file that will be loaded is checked against its hash first."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vlm_edge_runtime.errors import BundleError, TargetError

from .manifest import SCHEMA_VERSION, Build, FileRef, GraphEntry, KVLayout, Manifest

MANIFEST = "manifest.json"
PORTABLE = "portable"
_CHUNK = 16 << 20
"""Bytes that are hashed at a time. Each piece waits for the interpreter lock once, so they are large."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    size = min(_CHUNK, max(path.stat().st_size, 1))
    # Pages of its own: freed memory of this size would stay with the process.
    with path.open("rb", buffering=0) as stream, mmap.mmap(-1, size) as pages, memoryview(pages) as buffer:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def read_manifest(path: str | Path) -> Manifest:
    """Reads and validates `path/manifest.json`. Raises BundleError with what is wrong and what to do."""
    root = Path(path)
    file = root / MANIFEST
    if not root.is_dir():
        raise BundleError(f"{root} is not a bundle: no such folder. Make one with `vlm-edge export SOURCE {root}`.")
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{root} is not a bundle: it has no {MANIFEST}. Was its export interrupted? Export it again.") from None
    try:
        version = json.loads(data).get("schema_version")
    except (ValueError, AttributeError) as error:
        raise BundleError(f"{file} is not valid JSON ({error}): the bundle is damaged; copy or export it again.") from None
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise BundleError(
            f"{file} has schema version {version!r}, this vlm-edge reads up to {SCHEMA_VERSION}: update vlm-edge, "
            "or export the bundle again with this version."
        )
    try:
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.ValidationError as error:
        raise BundleError(f"{file} does not follow schema {SCHEMA_VERSION}: {error}. Export the bundle again.") from None


@dataclass(slots=True, frozen=True)
class Bundle:
    """An opened bundle with one set of graphs chosen: a build's, or the portable ones (`build` is None)."""

    path: Path
    manifest: Manifest
    build: Build | None
    graphs: dict[str, GraphEntry]

    def graph_path(self, role: str) -> Path:
        """The ONNX file of a role. Raises BundleError when this bundle has no such graph."""
        try:
            return self.path / self.graphs[role].model.file
        except KeyError:
            raise BundleError(f"{self.path} has no graph '{role}'; it has: {', '.join(sorted(self.graphs))}.") from None

    @property
    def build_name(self) -> str:
        """The build's name, or `portable`."""
        return self.build.name if self.build else PORTABLE

    @property
    def kv(self) -> KVLayout | None:
        """The KV layout of the chosen graphs (None for families without a decoder)."""
        if self.build and self.build.kv:
            return self.build.kv
        return getattr(self.manifest.contract, "kv", None)

    def has_file(self, name: str) -> bool:
        """Whether the exporter wrote this side file (`chat_template.jinja` …)."""
        return any(ref.file == name for ref in self.manifest.files)

    def read_text(self, name: str) -> str:
        """A side file's text. Raises BundleError when the bundle never had it."""
        if not self.has_file(name):
            raise BundleError(f"{self.path} has no {name}; it has: {', '.join(ref.file for ref in self.manifest.files)}.")
        return (self.path / name).read_text(encoding="utf-8")

    def read_json(self, name: str) -> dict[str, Any]:
        """A side file parsed as a JSON object."""
        value = json.loads(self.read_text(name))
        if not isinstance(value, dict):
            raise BundleError(f"{self.path / name} is not a JSON object.")
        return value


def open_bundle(path: str | Path, *, build: str | None = None, verify: bool = True) -> Bundle:
    """Opens a bundle with the graphs of `build` (None or "portable": the portable graphs).

    With `verify`, the hash of every file that the chosen graphs and the runtime will read is checked; of graphs that engines
    stand for, only that their files are there. A role that the build has in several graphs (a decoder per context bucket) is
    not among `graphs` by itself.
    Raises BundleError (damage) or TargetError (no such build).
    """
    root = Path(path)
    manifest = read_manifest(root)
    chosen: Build | None = None
    if build is not None and build != PORTABLE:
        if build not in manifest.builds:
            raise TargetError(
                f"{root} has no build '{build}'; it has: {', '.join([PORTABLE, *manifest.builds])}. "
                f"Make it with `vlm-edge build {root} --target {build}`."
            )
        chosen = manifest.builds[build]
    built = chosen.graphs if chosen else {}
    several = {entry.role for entry in built.values()} - set(built)
    graphs = {**{role: entry for role, entry in manifest.graphs.items() if role not in several}, **built}
    bundle = Bundle(root, manifest, chosen, graphs)
    engines = chosen.engines if chosen else []
    compiled = {one.graph for one in engines}
    read = [*manifest.files, *(one.file for one in engines), *_files(graphs, set(graphs) - compiled)]
    kept = _files(graphs, compiled & set(graphs))
    for ref in (*read, *kept):
        _inside(root, ref)
    check_files(root, read, hashes=verify)
    check_files(root, kept, hashes=False)
    return bundle


def _files(graphs: dict[str, GraphEntry], names: Iterable[str]) -> list[FileRef]:
    return [ref for name in sorted(names) for ref in (graphs[name].model, *graphs[name].data)]


def check_files(root: Path, refs: Iterable[FileRef], *, hashes: bool = True) -> None:
    """Checks that each file is there with its recorded size and (with `hashes`) content. Raises BundleError on the first that

    is not.
    """
    seen: set[str] = set()
    for ref in refs:
        if ref.file in seen:
            continue
        seen.add(ref.file)
        path = root / ref.file
        if not path.is_file():
            raise BundleError(f"{path} is missing: the bundle is incomplete; {_again(ref)}.")
        size = path.stat().st_size
        if size != ref.bytes:
            word = "truncated" if size < ref.bytes else "too long"
            raise BundleError(f"{path} is {word}: {size} bytes, the manifest says {ref.bytes}; {_again(ref)}.")
        if hashes and (found := file_sha256(path)) != ref.sha256:
            raise BundleError(
                f"{path} has SHA-256 {found[:16]}…, the manifest says {ref.sha256[:16]}…: the file was changed or damaged; "
                f"{_again(ref)}."
            )


def _again(ref: FileRef) -> str:
    """What to do about a damaged file: an engine is compiled anew from its graph, anything else comes from elsewhere."""
    if ref.file.endswith(".engine"):
        return "run the build's `vlm-edge build` again, which compiles what is missing"
    return "copy or export the bundle again"


def _inside(root: Path, ref: FileRef) -> None:
    """A manifest may name only files inside its own folder."""
    path = Path(ref.file)
    if path.is_absolute() or ".." in path.parts:
        raise BundleError(f"{root / MANIFEST} names a file outside the bundle ({ref.file!r}): refused.")
