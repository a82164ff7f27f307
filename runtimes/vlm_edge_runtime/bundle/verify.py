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
from typing import Self

from vlm_edge_runtime import _native
from vlm_edge_runtime.errors import BundleError

from .manifest import FileRef

_CHUNK = 16 << 20
"""Bytes that are read and hashed at a time. Each piece waits for the interpreter lock twice, so they are large."""
_WINDOW = 16 << 20
"""Bytes of a mapped file that are brought into memory and then hashed; between two of them a thread sees that it is to stop."""
_SMALL = 1 << 20
"""Up to so many bytes a file is read: mapping it would not pay."""
_THREADS = 3
"""At most; one file is hashed by one thread, and a bundle has few large ones."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex. Raises OSError when it cannot be read."""
    digest = _digest(path, _mapped(path), threading.Event())
    assert digest is not None  # nobody can have stopped it
    return digest


def _mapped(path: Path) -> mmap.mmap | None:
    """A large file as the system's cache holds it; None for a small one, and where it cannot be had so: then it is read."""
    try:
        with path.open("rb", buffering=0) as stream:
            if os.fstat(stream.fileno()).st_size <= _SMALL:
                return None
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, OverflowError, ValueError):
        return None


def _digest(path: Path, mapping: mmap.mmap | None, stop: threading.Event) -> str | None:
    """None when `stop` was set before the whole of a large file was hashed. Closes the mapping."""
    digest = hashlib.sha256()
    done = 0
    if mapping is not None:
        # Nothing is copied. Pages are filled before they are looked at: unlike looking, that fails without a signal where a disk
        # cannot give them. Only a file that is cut short, or pages that are taken back and fail to be read again, within the few
        # milliseconds between filling a window and having hashed it would still end the process.
        with mapping, memoryview(mapping) as content:
            while done < len(content) and not stop.is_set():
                with content[done : done + _WINDOW] as piece:
                    if not _native.fill_pages(piece):
                        break
                    digest.update(piece)
                    done += len(piece)
            if done == len(content):
                return digest.hexdigest()
    with path.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size <= _SMALL:
            return hashlib.sha256(stream.read()).hexdigest()
        stream.seek(done)
        size = min(_CHUNK, max(size - done, 1))
        # Pages of its own: freed memory of this size would stay with the process.
        with mmap.mmap(-1, size) as pages, memoryview(pages) as buffer:
            while not stop.is_set() and (count := stream.readinto(buffer)):
                digest.update(buffer[:count])
    return None if stop.is_set() else digest.hexdigest()


class Verification:
    """Hashes files: `first` at once, then `rest` by threads, the largest first, until `close`.

    Threads want the interpreter lock seldom, so that they get on while the caller imports and reads. With several errors the
    one is raised whose file stands first, whoever found it when. A context manager: no thread outlives it.
    """

    def __init__(self, root: Path, first: Iterable[FileRef], rest: Iterable[FileRef] = (), *, threads: int | None = None) -> None:
        """That the files are there and have their sizes is the caller's to see (`check_size`).

        `threads`: by default one for each core but the caller's, who hashes too while it waits. Raises BundleError with the first
        of `first` that is not what the manifest says.
        """
        self._root = root
        self._found: dict[str, Exception | None] = {}
        self._told = threading.Condition()
        self._stop = threading.Event()
        looked = _once(first)
        for name, ref in looked.items():
            self._look(ref, _mapped(root / name))
            self._raise(name)
        self._rest = {name: ref for name, ref in _once(rest).items() if name not in looked}
        largest = sorted(self._rest.values(), key=lambda ref: -ref.bytes)
        self._left: deque[tuple[FileRef, mmap.mmap | None]] = deque()
        self._threads: list[threading.Thread] = []
        try:
            self._left.extend((ref, _mapped(root / ref.file)) for ref in largest)
            self._start(min(_threads() if threads is None else threads, len(self._left)))
        except BaseException:
            self.close()
            raise

    def _start(self, count: int) -> None:
        """As many threads as the system gives; what they do not hash `wait` does."""
        for index in range(count):
            thread = threading.Thread(target=self._work, name=f"vlm-edge verify {index}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # "can't start new thread"
                return
            self._threads.append(thread)

    def wait(self) -> None:
        """Waits for `rest`. Raises BundleError with the first of them that is not what the manifest says.

        Raises RuntimeError where `close` ended it before all were hashed: those are not verified.
        """
        self._work()
        for name in self._rest:
            with self._told:
                while name not in self._found:
                    if self._stop.is_set():
                        raise RuntimeError(
                            f"{self._root / name} is not verified: the verification was closed before; open it again."
                        )
                    self._told.wait()
            self._raise(name)

    def close(self) -> None:
        """Ends the threads, which finish at most a piece each. Closing twice does no harm."""
        self._stop.set()
        with self._told:
            self._told.notify_all()
        for thread in self._threads:
            thread.join()
        while self._left:
            _, mapping = self._left.pop()
            if mapping is not None:
                mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _raise(self, name: str) -> None:
        if (error := self._found[name]) is not None:
            raise error

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                ref, mapping = self._left.popleft()
            except IndexError:
                return
            self._look(ref, mapping)

    def _look(self, ref: FileRef, mapping: mmap.mmap | None) -> None:
        """Hashes a file, and tells what was found. Of one that was not hashed whole, nothing is told."""
        error: Exception | None = None
        try:
            found = _digest(self._root / ref.file, mapping, self._stop)
            if found is None:
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


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_THREADS, cores - 1))


def check_files(root: Path, refs: Iterable[FileRef], *, hashes: bool = True) -> None:
    """Checks that each file is there with its recorded size and (with `hashes`) content.

    Raises BundleError: on the first that is missing or of another size, else on the first of another content.
    """
    files: Sequence[FileRef] = list(refs)
    for ref in files:
        check_size(root, ref)
    with Verification(root, (), files if hashes else ()) as verification:
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
