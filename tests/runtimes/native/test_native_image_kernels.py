"""Inner loops of resizing as a C program: against the scalar ones, under sanitizers, with several callers, NEON under qemu."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from test_native_kernels import NATIVE, SANITIZED, TESTS, compiled, run

NAMES = ("scalar", "avx2", "avx512", "neon")

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None or os.name == "nt", reason="needs gcc")


def sources(folder: Path = NATIVE) -> list[Path]:
    own = [file for file in folder.glob("image*.c") if file.name != "image_api.c"]
    return [TESTS / "image_test.c", *sorted(own), NATIVE / "pool.c"]


@pytest.mark.slow
def test_only_what_is_theirs_is_read_and_written(tmp_path):
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = compiled(tmp_path, "image_test", sources(), *flags)
    for name in NAMES:
        done = run(program, name)
        assert done.returncode in (0, 2), f"{name}: {done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.skipif(SANITIZED, reason="two sanitizers do not go together")
def test_callers_share_threads_and_weights_without_races(tmp_path):
    program = compiled(tmp_path, "image_test", sources(), "-g", "-fsanitize=thread")
    done = run(program, "scalar", "60")
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_of_another_machine_agree_with_the_scalar_ones(tmp_path):
    if shutil.which("aarch64-linux-gnu-gcc") is None or shutil.which("qemu-aarch64") is None:
        pytest.skip("needs gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user")
    program = compiled(tmp_path, "image_test", sources(), "-static", compiler="aarch64-linux-gnu-gcc")
    for name in ("neon", "scalar"):
        done = run("qemu-aarch64", "-cpu", "max", program, name, "60")
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"


def test_planted_mistake_is_found(tmp_path):
    """The comparison is not blind: a weight's second byte that counts for less shows."""
    for file in (*NATIVE.glob("image*.h"), *NATIVE.glob("image*.c"), NATIVE / "pool.h"):
        shutil.copy(file, tmp_path)
    (tmp_path / "kernels").mkdir()
    for file in (NATIVE / "kernels").glob("target_*.inc"):
        shutil.copy(file, tmp_path / "kernels")
    for name, before, after in (
        ("image_avx2.c", "_mm256_slli_epi32(high, HIGH_SHIFT)", "_mm256_slli_epi32(high, HIGH_SHIFT - 1)"),
        ("image_neon.c", "vshlq_n_s32(sums[1], 8)", "vshlq_n_s32(sums[1], 7)"),
    ):
        text = (tmp_path / name).read_text()
        assert before in text
        (tmp_path / name).write_text(text.replace(before, after))
    test = (TESTS / "image_test.c").read_text().replace("../../../../runtimes/native/image.h", str(tmp_path / "image.h"))
    (tmp_path / "planted_test.c").write_text(test)
    program = compiled(tmp_path, "planted", [tmp_path / "planted_test.c", *sources(tmp_path)[1:]], "-O0")
    found = {name: run(program, name, "20").returncode for name in ("avx2", "neon")}
    assert set(found.values()) <= {1, 2}, found
    if 1 not in found.values():
        pytest.skip("this CPU runs the scalar code alone")
