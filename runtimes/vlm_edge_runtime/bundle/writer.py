"""Writing a bundle so that a reader meets either the old state or the new one, never half of one.

A new bundle grows in a temporary folder beside its place and is renamed when complete; a build likewise inside
`builds/`; the manifest is replaced by rename. Whatever raises (a full disk, Ctrl-C) removes the temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from vlm_edge_runtime.errors import BundleError

from .manifest import SCHEMA_VERSION, Build, FileRef, Manifest
from .reader import MANIFEST, file_sha256, read_manifest


def now() -> str:
    """The current time as the manifest records it (UTC, seconds)."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def file_ref(root: Path, file: str) -> FileRef:
    """The reference of `root/file`: its hash and size as they are on disk now."""
    path = root / file
    return FileRef(file=file, sha256=file_sha256(path), bytes=path.stat().st_size)


class _Folder:
    """A temporary folder next to `final`, which takes its place on commit or disappears."""

    def __init__(self, final: Path, overwrite: bool, what: str) -> None:
        if final.exists() and not overwrite:
            raise BundleError(f"{final} exists already; choose another name or pass --overwrite to replace the {what}.")
        self.final = final
        self._what = what
        self._overwrite = overwrite
        self._committed = False
        final.parent.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
        self.path.chmod(0o755)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._committed:
            shutil.rmtree(self.path, ignore_errors=True)

    def _place(self) -> None:
        """Renames the folder into place; an old one is moved aside first and removed after."""
        _sync_tree(self.path)
        aside: Path | None = None
        if self.final.exists():
            if not self._overwrite:
                raise BundleError(f"{self.final} appeared while the {self._what} was being written; nothing was replaced.")
            aside = Path(tempfile.mkdtemp(prefix=f".{self.final.name}.", suffix=".old", dir=self.final.parent))
            self.final.rename(aside / "old")
        try:
            self.path.rename(self.final)
        except BaseException:
            if aside is not None:
                (aside / "old").rename(self.final)
                aside.rmdir()
            raise
        self._committed = True
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


class BundleWriter(_Folder):
    """A bundle being written. `with BundleWriter(out) as w: …files under w.path…; w.commit(manifest)`."""

    def __init__(self, out: str | Path, overwrite: bool = False) -> None:
        super().__init__(Path(out), overwrite, "bundle")

    def ref(self, file: str) -> FileRef:
        """The reference of a file already written under `path`."""
        return file_ref(self.path, file)

    def commit(self, manifest: Manifest) -> None:
        """Writes the manifest and moves the folder to its place."""
        _write_manifest(self.path, manifest)
        self._place()


class BuildWriter(_Folder):
    """A build being written into `builds/NAME` of an existing bundle.

    References are made with `ref`, relative to the bundle's root as they will be after the commit.
    """

    def __init__(self, bundle: str | Path, name: str, overwrite: bool = False) -> None:
        self._bundle = Path(bundle)
        self._name = name
        read_manifest(self._bundle)
        super().__init__(self._bundle / "builds" / name, overwrite, "build")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        with contextlib.suppress(OSError):  # an empty builds/ was ours; a filled one stays
            (self._bundle / "builds").rmdir()

    def ref(self, file: str) -> FileRef:
        """The reference of `path/file`, named as `builds/NAME/file`."""
        found = file_ref(self.path, file)
        return FileRef(file=f"builds/{self._name}/{file}", sha256=found.sha256, bytes=found.bytes)

    def commit(self, build: Build) -> None:
        """Moves the folder to its place, then records the build in the manifest."""
        self._place()

        def record(manifest: Manifest) -> None:
            manifest.builds[build.name] = build

        update_manifest(self._bundle, record)


def update_manifest(bundle: str | Path, change: Callable[[Manifest], None]) -> Manifest:
    """Reads the manifest, lets `change` edit it, and replaces the file in one rename. Returns what was written."""
    root = Path(bundle)
    manifest = read_manifest(root)
    change(manifest)
    _write_manifest(root, manifest)
    return manifest


def _write_manifest(root: Path, manifest: Manifest) -> None:
    manifest.schema_version = SCHEMA_VERSION  # it may say now what an older schema has no word for
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    handle, name = tempfile.mkstemp(prefix=f".{MANIFEST}.", dir=root)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(root / MANIFEST)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _sync_tree(root: Path) -> None:
    """Flushes every file to the disk, so that a rename never outruns its content (power loss on a device)."""
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
