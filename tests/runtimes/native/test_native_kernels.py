"""The kernels and the thread pool as C programs: against float64, under sanitizers, and NEON under qemu-user."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
NATIVE = ROOT / "runtimes" / "native"
TESTS = Path(__file__).parent / "kernels"
NAMES = ("scalar", "avx2", "avx512", "avx512-bf16", "neon")
SANITIZED = "VLM_EDGE_SANITIZED" in os.environ

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None or os.name == "nt", reason="needs gcc")


def compiled(folder: Path, name: str, sources: list[Path], *flags: str, compiler: str = "gcc") -> Path:
    program = folder / name
    command = [compiler, "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-fno-math-errno", *flags]
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    subprocess.run([*command, *map(str, sources), "-lm", "-lpthread", "-o", str(program)], check=True, env=environment)
    return program


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, check=False)


def kernel_sources() -> list[Path]:
    tests = ("kernels", "products", "numbers", "bytes", "attention", "cache")
    return [*(TESTS / f"{name}_test.c" for name in tests), *sorted((NATIVE / "kernels").glob("*.c"))]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return compiled(tmp_path_factory.mktemp("plain"), "kernels_test", kernel_sources())


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """With AddressSanitizer and UndefinedBehaviorSanitizer: an odd tail that reads beyond its row is an error."""
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    return compiled(tmp_path_factory.mktemp("sanitized"), "kernels_test", kernel_sources(), *flags)


def check(program: Path, name: str) -> None:
    done = run(program, name)
    if done.returncode == 2:
        pytest.skip(f"this CPU has no {name}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_kernels_agree_with_float64(plain, name):
    check(plain, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_kernels_read_and_write_only_what_is_theirs(sanitized, name):
    check(sanitized, name)


def with_a_mistake(folder: Path, right: str, wrong: str) -> Path:
    """The tests of the kernels, one place of one of which is not what it should be."""
    for file in (*(NATIVE / "kernels").glob("*.h"), *(NATIVE / "kernels").glob("*.inc"), *(NATIVE / "kernels").glob("*.c")):
        shutil.copy(file, folder)
    holding = [file for file in folder.iterdir() if right in file.read_text()]
    assert len(holding) == 1, f"'{right}' is in {len(holding)} files"
    holding[0].write_text(holding[0].read_text().replace(right, wrong))
    for test in (TESTS / "checking.h", *(source for source in kernel_sources() if source.parent == TESTS)):
        text = test.read_text().replace("../../../../runtimes/native/kernels/kernels.h", "kernels.h")
        (folder / test.name).write_text(text)
    return compiled(folder, "planted", sorted(folder.glob("*.c")), "-O0", "-Wno-unused-function")


def test_planted_mistake_is_found(tmp_path):
    """The comparison is not blind: a wrong offset of the 4-bit codes shows."""
    done = run(with_a_mistake(tmp_path, "(four ? 1 : 16)", "(four ? 1 : 15)"), "scalar")
    assert done.returncode == 1
    assert "int8" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("factor", ["7.802403e-2f", "2.2606707e-1f", "6.9583399e-1f"])
def test_one_percent_of_a_factor_of_powers_shows(tmp_path, factor):
    """Of the polynomial for 2^x: of attention, whose weights are rounded to 8 bits afterwards, or of activations before it."""
    done = run(with_a_mistake(tmp_path, f"({factor})", f"(1.01f * {factor})"), "avx512-bf16")
    if done.returncode == 2:
        pytest.skip("this CPU has no avx512-bf16")
    assert done.returncode == 1
    assert "2^x" in done.stdout or "bytes" in done.stdout  # the first differences are printed


@pytest.fixture(scope="module")
def arm(tmp_path_factory) -> Path:
    if shutil.which("aarch64-linux-gnu-gcc") is None or shutil.which("qemu-aarch64") is None:
        pytest.skip("needs gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user")
    return compiled(tmp_path_factory.mktemp("arm"), "kernels_test", kernel_sources(), "-static", compiler="aarch64-linux-gnu-gcc")


@pytest.mark.parametrize("name", ["neon", "scalar"])
def test_kernels_of_another_machine_agree_with_float64(arm, name):
    done = run("qemu-aarch64", "-cpu", "max", arm, name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(SANITIZED, reason="two sanitizers do not go together")
def test_pool_is_free_of_races(tmp_path):
    program = compiled(tmp_path, "pool_test", [TESTS / "pool_test.c", NATIVE / "pool.c"], "-g", "-fsanitize=thread")
    for threads in (1, 2, 3, 8):
        done = run(program, str(threads))
        assert done.returncode == 0, done.stdout + done.stderr
