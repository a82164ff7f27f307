"""Whether a bundle's files are what its manifest says. Hashing is done by threads of its own, beside other work."""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from vlm_edge_runtime import _native
from vlm_edge_runtime.errors import BundleError

from .manifest import FileRef

_CHUNK = 16 << 20
"""Bytes that are read and hashed at a time. Each piece waits for the interpreter lock twice, so they are large."""
_WINDOW = 256 << 20
"""Bytes of a file that are mapped at a time; between two of them a thread sees that it is to stop."""
_SMALL = 1 << 20
"""Up to so many bytes a file is read: mapping it would not pay."""
_THREADS = 2
"""The largest file is most of a bundle, and one file is hashed by one thread."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex. Raises OSError when it cannot be read."""
    digest = _digest(path, threading.Event())
    assert digest is not None  # nobody can have stopped it
    return digest


def _digest(path: Path, stop: threading.Event) -> str | None:
    """None when `stop` was set meanwhile."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        done = 0
        while size > _SMALL and done < size and not stop.is_set():
            if not _hash_mapped(stream, done, min(_WINDOW, size - done), digest):
                break
            done += min(_WINDOW, size - done)
        if size <= _SMALL or done < size:
            stream.seek(done)
            _hash_read(stream, digest, min(_CHUNK, max(size, 1)), stop)
    return None if stop.is_set() else digest.hexdigest()


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...


def _hash_mapped(stream: Any, offset: int, length: int, digest: _Hash) -> bool:
    """Hashes a piece where the system's cache holds it: nothing is copied, and the interpreter lock is waited for once.

    False when that cannot be done here. Pages are filled first, which, unlike looking at them, fails without a signal.
    """
    with mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_READ, offset=offset) as mapping:
        if not _native.fill_pages(mapping):
            return False
        digest.update(mapping)
        return True


def _hash_read(stream: Any, digest: _Hash, size: int, stop: threading.Event) -> None:
    # Pages of its own: freed memory of this size would stay with the process.
    with mmap.mmap(-1, size) as pages, memoryview(pages) as buffer:
        while not stop.is_set() and (count := stream.readinto(buffer)):
            digest.update(buffer[:count])


class Verification:
    """Hashes files in threads until `wait` has told, or `close` ends it.

    `first` are hashed before all others; of the `rest` the largest come first, so that no thread is left with one at the end.
    With several errors the one is raised whose file stands first in `first`, then `rest`, whatever thread found it when. A
    context manager: no thread outlives it.
    """

    def __init__(self, root: Path, first: Iterable[FileRef], rest: Iterable[FileRef] = (), *, threads: int = _THREADS) -> None:
        """Begins to hash. That the files are there and have their sizes is the caller's to see (`check_size`)."""
        self._root = root
        self._first = _once(first)
        self._all = {**self._first, **_once(rest)}
        others = [ref for ref in self._all.values() if ref.file not in self._first]
        self._left = deque([*self._first.values(), *sorted(others, key=lambda ref: -ref.bytes)])
        self._found: dict[str, Exception | None] = {}
        self._told = threading.Condition()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"vlm-edge verify {index}", daemon=True)
            for index in range(min(threads, len(self._left)))
        ]
        for thread in self._threads:
            thread.start()

    def wait_first(self) -> None:
        """Waits for `first`. Raises BundleError with the first of them that is not what the manifest says."""
        self._wait(self._first)

    def wait(self) -> None:
        """Waits for all files. Raises BundleError with the first that is not what the manifest says."""
        self._wait(self._all)

    def close(self) -> None:
        """Ends the threads, which finish at most a piece each."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _wait(self, files: Iterable[str]) -> None:
        for file in files:
            with self._told:
                while file not in self._found:
                    self._told.wait()
            if (error := self._found[file]) is not None:
                raise error

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                ref = self._left.popleft()
            except IndexError:
                return
            error: Exception | None = None
            try:
                if (found := _digest(self._root / ref.file, self._stop)) is None:
                    return
                if found != ref.sha256:
                    error = _changed(self._root, ref, found)
            except OSError as problem:
                error = BundleError(f"{self._root / ref.file} cannot be read ({problem}); {again(ref)}.")
            except Exception as problem:  # whatever it is, it is raised where it is waited for
                error = problem
            with self._told:
                self._found[ref.file] = error
                self._told.notify_all()


def check_files(root: Path, refs: Iterable[FileRef], *, hashes: bool = True) -> None:
    """Checks that each file is there with its recorded size and (with `hashes`) content.

    Raises BundleError: on the first that is missing or of another size, else on the first of another content.
    """
    files: Sequence[FileRef] = list(refs)
    for ref in files:
        check_size(root, ref)
    with Verification(root, files if hashes else ()) as verification:
        verification.wait()


def check_size(root: Path, ref: FileRef) -> None:
    """Checks that a file is there and has its recorded size. Raises BundleError."""
    path = root / ref.file
    if not path.is_file():
        raise BundleError(f"{path} is missing: the bundle is incomplete; {again(ref)}.")
    size = path.stat().st_size
    if size != ref.bytes:
        word = "truncated" if size < ref.bytes else "too long"
        raise BundleError(f"{path} is {word}: {size} bytes, the manifest says {ref.bytes}; {again(ref)}.")


def again(ref: FileRef) -> str:
    """What to do about a damaged file: an engine is compiled anew from its graph, anything else comes from elsewhere."""
    if ref.file.endswith(".engine"):
        return "run the build's `vlm-edge build` again, which compiles what is missing"
    return "copy or export the bundle again"


def _changed(root: Path, ref: FileRef, found: str) -> BundleError:
    return BundleError(
        f"{root / ref.file} has SHA-256 {found[:16]}…, the manifest says {ref.sha256[:16]}…: the file was changed or damaged; "
        f"{again(ref)}."
    )


def _once(refs: Iterable[FileRef]) -> dict[str, FileRef]:
    """By name; of files that are named twice the first."""
    found: dict[str, FileRef] = {}
    for ref in refs:
        found.setdefault(ref.file, ref)
    return found
