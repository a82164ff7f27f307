"""Opening a bundle: the manifest is validated, and every file that will be loaded is checked against its hash first."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vlm_edge_runtime.errors import BundleError, TargetError

from .manifest import SCHEMA_VERSION, Build, FileRef, GraphEntry, KVLayout, Manifest
from .verify import Verification, check_files, check_size, file_sha256

__all__ = [
    "MANIFEST",
    "PORTABLE",
    "Bundle",
    "begin_bundle",
    "check_files",
    "file_sha256",
    "open_bundle",
    "read_manifest",
]

MANIFEST = "manifest.json"
PORTABLE = "portable"


class _Version(msgspec.Struct):
    """What is looked at before the rest, which another version may say in other words."""

    schema_version: Any = None


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
        version = msgspec.json.decode(data, type=_Version).schema_version
    except msgspec.ValidationError as error:
        raise BundleError(f"{file} is JSON, but no manifest ({error}): the bundle is damaged; copy or export it again.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _no_json(file, error) from None
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise BundleError(
            f"{file} has schema version {version!r}, this vlm-edge reads up to {SCHEMA_VERSION}: update vlm-edge, "
            "or export the bundle again with this version."
        )
    try:
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.ValidationError as error:
        raise BundleError(f"{file} does not follow schema {SCHEMA_VERSION}: {error}. Export the bundle again.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # in a field that was skipped above
        raise _no_json(file, error) from None


def _no_json(file: Path, error: Exception) -> BundleError:
    return BundleError(f"{file} is not valid JSON ({error}): the bundle is damaged; copy or export it again.")


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
        return self._side_file(name).read_text(encoding="utf-8")

    def read_bytes(self, name: str) -> bytes:
        """A side file as it is. Raises BundleError when the bundle never had it."""
        return self._side_file(name).read_bytes()

    def read_json(self, name: str) -> dict[str, Any]:
        """A side file parsed as a JSON object."""
        value = json.loads(self.read_text(name))
        if not isinstance(value, dict):
            raise BundleError(f"{self.path / name} is not a JSON object.")
        return value

    def _side_file(self, name: str) -> Path:
        if not self.has_file(name):
            raise BundleError(f"{self.path} has no {name}; it has: {', '.join(ref.file for ref in self.manifest.files)}.")
        return self.path / name


def open_bundle(path: str | Path, *, build: str | None = None, verify: bool = True) -> Bundle:
    """Opens a bundle with the graphs of `build` (None or "portable": the portable graphs).

    With `verify`, the hash of every file that the chosen graphs and the runtime will read is checked; of graphs that engines
    stand for, only that their files are there. A role that the build has in several graphs (a decoder per context bucket) is
    not among `graphs` by itself.
    Raises BundleError (damage) or TargetError (no such build).
    """
    bundle, verification = begin_bundle(path, read_manifest(path), build=build, verify=verify)
    with verification:
        verification.wait()
    return bundle


def begin_bundle(
    path: str | Path, manifest: Manifest, *, build: str | None = None, verify: bool = True
) -> tuple[Bundle, Verification]:
    """`open_bundle`, the graphs' files being hashed meanwhile: none is to be read before the verification's `wait` has returned.

    The manifest's side files are verified already. The caller closes the verification. Raises as `open_bundle`, but for graphs
    with a wrong hash, of which `wait` tells.
    """
    root = Path(path)
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
    engines = chosen.engines if chosen else []
    compiled = {one.graph for one in engines}
    read = [*(one.file for one in engines), *_files(graphs, set(graphs) - compiled)]
    kept = _files(graphs, compiled & set(graphs))
    for ref in (*manifest.files, *read, *kept):
        _inside(root, ref)
    for ref in (*manifest.files, *read, *kept):
        check_size(root, ref)
    bundle = Bundle(root, manifest, chosen, graphs)
    return bundle, Verification(root, manifest.files if verify else (), read if verify else ())


def _files(graphs: dict[str, GraphEntry], names: Iterable[str]) -> list[FileRef]:
    return [ref for name in sorted(names) for ref in (graphs[name].model, *graphs[name].data)]


def _inside(root: Path, ref: FileRef) -> None:
    """A manifest may name only files inside its own folder."""
    path = Path(ref.file)
    if path.is_absolute() or ".." in path.parts:
        raise BundleError(f"{root / MANIFEST} names a file outside the bundle ({ref.file!r}): refused.")
