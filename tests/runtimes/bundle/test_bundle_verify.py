"""Hashing in threads: every file is looked at, one and the same error wins, nothing is left running or open."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from pathlib import Path

import pytest

from vlm_edge_runtime import _native
from vlm_edge_runtime.bundle import verify
from vlm_edge_runtime.bundle.manifest import FileRef
from vlm_edge_runtime.bundle.verify import Verification, check_files, file_sha256
from vlm_edge_runtime.errors import BundleError

OPEN = Path("/proc/self/fd")
DENIED = Path("/proc/sys/vm/compact_memory")
"""Can be written alone, by root too."""
SIZES = (0, 1, 300, 4096, (1 << 20) + 1, 3 << 20, 17, (2 << 20) + 4095)


@pytest.fixture
def files(tmp_path: Path) -> list[FileRef]:
    found = []
    for index, size in enumerate(SIZES):
        content = bytes([index]) * size
        (tmp_path / f"{index}.bin").write_bytes(content)
        found.append(FileRef(file=f"{index}.bin", sha256=hashlib.sha256(content).hexdigest(), bytes=size))
    return found


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "verify" in thread.name]


def damage(path: Path) -> None:
    """The last byte becomes another one."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("window", [4096, 1 << 20, 16 << 20])
def test_a_hash_is_that_of_the_whole_file_however_it_is_read(tmp_path, files, monkeypatch, window):
    monkeypatch.setattr(verify, "_WINDOW", window)
    assert [file_sha256(tmp_path / ref.file) for ref in files] == [ref.sha256 for ref in files]
    monkeypatch.setattr(verify, "_SMALL", 1 << 40)  # where files are not mapped
    monkeypatch.setattr(verify, "_CHUNK", 4096)
    assert [file_sha256(tmp_path / ref.file) for ref in files] == [ref.sha256 for ref in files]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere files are read")
def test_pages_of_a_file_that_ends_too_early_are_not_filled_but_never_fatal(tmp_path):
    import mmap

    path = tmp_path / "cut"
    path.write_bytes(bytes(1 << 20))
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 1 << 20, access=mmap.ACCESS_READ) as mapping:
        whole = _native.fill_pages(mapping)
        stream.truncate(4096)
        assert not _native.fill_pages(mapping)  # looking at those pages would end the process
    if not whole:
        pytest.skip("this Linux is older than 5.14")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a mapped file cannot be cut")
def test_what_cannot_be_mapped_after_the_first_window_is_read_from_there_on(tmp_path, monkeypatch):
    import mmap

    path, content = tmp_path / "cut", os.urandom(4 << 20)
    path.write_bytes(content)
    monkeypatch.setattr(verify, "_WINDOW", 1 << 20)
    monkeypatch.setattr(verify, "_CHUNK", 4096)
    with path.open("r+b") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        stream.truncate(5 << 19)  # in the third window, whose pages cannot all be filled
    assert verify._digest(path, mapping, threading.Event()) == hashlib.sha256(content[: 5 << 19]).hexdigest()
    assert mapping.closed


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
@pytest.mark.parametrize("wrong", [*range(1, len(SIZES)), None])
def test_every_file_is_verified_on_any_number_of_threads(tmp_path, files, threads, wrong):
    if wrong is not None:
        damage(tmp_path / files[wrong].file)
    with Verification(tmp_path, files[:1], files[1:], threads=threads) as verification:
        if wrong is None:
            verification.wait()
        else:
            with pytest.raises(BundleError, match=rf"{wrong}\.bin has SHA-256"):
                verification.wait()
    assert not running()


@pytest.mark.parametrize("round", range(8))
def test_of_several_errors_the_first_in_the_list_wins(tmp_path, files, round):
    for index in (4, 5, 6, 7):  # the smallest is hashed last, and found first where others are in hand
        damage(tmp_path / files[index].file)
    with pytest.raises(BundleError, match=r"4\.bin has SHA-256"):
        check_files(tmp_path, files)
    assert not running()


def test_side_files_are_verified_before_the_others_are_waited_for(tmp_path, files):
    damage(tmp_path / files[7].file)
    with Verification(tmp_path, files[:3], files[3:]) as verification, pytest.raises(BundleError, match=r"7\.bin"):
        verification.wait()
    damage(tmp_path / files[1].file)
    with pytest.raises(BundleError, match=r"1\.bin"):
        Verification(tmp_path, files[:3], files[3:])
    assert not running()


def test_sizes_are_looked_at_before_any_hash(tmp_path, files):
    damage(tmp_path / files[1].file)
    os.truncate(tmp_path / files[5].file, 5)
    with pytest.raises(BundleError, match=rf"5\.bin is truncated: 5 bytes, the manifest says {SIZES[5]}"):
        check_files(tmp_path, files)


def test_a_file_that_goes_meanwhile_cannot_be_read(tmp_path, files):
    (tmp_path / files[3].file).unlink()
    with Verification(tmp_path, files[:3], files[3:]) as verification, pytest.raises(BundleError, match=r"3\.bin cannot be read"):
        verification.wait()
    assert not running()


def test_a_file_that_must_not_be_read_is_said(tmp_path, files):
    path = tmp_path / files[3].file
    path.chmod(0)
    if os.access(path, os.R_OK):  # root
        if not DENIED.is_file() or os.access(DENIED, os.R_OK):
            pytest.skip("nothing is denied here")
        path.unlink()
        path.symlink_to(DENIED)
    with (
        Verification(tmp_path, files[:3], files[3:]) as verification,
        pytest.raises(BundleError, match=r"3\.bin cannot be read \(.*[Dd]enied.*copy or export the bundle again"),
    ):
        verification.wait()


@pytest.mark.parametrize("threads", [0, 2])
def test_whatever_goes_wrong_in_a_thread_is_raised_where_it_is_waited_for(tmp_path, files, threads):
    broken = FileRef(file=files[5].file, sha256=None, bytes=SIZES[5])  # has no first letters that could be shown
    with (
        Verification(tmp_path, (), [*files[:5], broken, *files[6:]], threads=threads) as verification,
        pytest.raises(TypeError),
    ):
        verification.wait()
    assert not running()


def test_what_was_stopped_is_not_verified(tmp_path):
    """A hole of 4 GB, whose hash takes longer than closing."""
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 4 << 30)
    (tmp_path / "small").write_bytes(b"x")
    refs = [FileRef(file=name, sha256=hashlib.sha256(b"x").hexdigest(), bytes=1) for name in ("small", "large")]
    for threads in (0, 1):
        verification = Verification(tmp_path, refs[:1], refs[1:], threads=threads)
        said: list[BaseException] = []

        def wait(verification: Verification = verification, said: list[BaseException] = said) -> None:
            try:
                verification.wait()
            except RuntimeError as error:
                said.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        verification.close()
        waiting.join()
        with pytest.raises(RuntimeError, match=r"large is not verified: the verification was closed before"):
            verification.wait()
        assert "not verified" in str(said[0]) and not running()


def test_a_verification_that_was_done_may_be_asked_after_it_was_closed(tmp_path, files):
    with Verification(tmp_path, files[:3], files[3:]) as verification:
        verification.wait()
    verification.wait()
    damage(tmp_path / files[4].file)
    with Verification(tmp_path, files[:3], files[3:]) as verification, pytest.raises(BundleError, match=r"4\.bin"):
        verification.wait()
    with pytest.raises(BundleError, match=r"4\.bin"):
        verification.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux gives no thread with a stack of 64 TB")
def test_without_threads_the_caller_hashes(tmp_path, files):
    before = threading.stack_size(1 << 46)
    try:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            threading.Thread(target=print).start()
        with Verification(tmp_path, files[:3], files[3:], threads=3) as verification:
            assert not running()
            verification.wait()
        damage(tmp_path / files[6].file)
        with pytest.raises(BundleError, match=r"6\.bin has SHA-256"):
            check_files(tmp_path, files)
    finally:
        threading.stack_size(before)


@pytest.mark.skipif(not OPEN.is_dir(), reason="counts open files where the system lists them")
def test_a_verification_that_cannot_begin_leaves_nothing_open(tmp_path, files):
    before = len(list(OPEN.iterdir()))
    nameless = FileRef(file=None, sha256="", bytes=0)  # looked at last, when the large ones are mapped
    with pytest.raises(TypeError) as raised:
        Verification(tmp_path, (), [*files, nameless])
    assert len(list(OPEN.iterdir())) == before and raised.tb and not running()


@pytest.mark.skipif(not OPEN.is_dir(), reason="counts open files where the system lists them")
def test_nothing_stays_open(tmp_path, files):
    check_files(tmp_path, files)
    before = len(list(OPEN.iterdir()))
    for _ in range(20):
        check_files(tmp_path, files)
        Verification(tmp_path, files).close()
    assert len(list(OPEN.iterdir())) == before
    assert not running()


def test_with_nothing_to_hash_nothing_is_started(tmp_path, files):
    with Verification(tmp_path, ()) as verification:
        verification.wait()
        assert not running()
    damage(tmp_path / files[4].file)
    check_files(tmp_path, files, hashes=False)
