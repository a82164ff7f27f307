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


@pytest.mark.parametrize("window", [4096, 1 << 20, 256 << 20])
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


@pytest.mark.parametrize("threads", [1, 2, 5])
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
