"""Threads of a block share memory only across barriers: the host-compiled kernels under ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _library() -> str:
    if shutil.which("g++") is None or shutil.which("setarch") is None:
        pytest.skip("g++ or setarch is not installed")
    found = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_file():
        pytest.skip("g++ has no ThreadSanitizer here")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("barriers", ["with", "without"])
def test_host_compiled_kernels_have_no_races(tmp_path, barriers) -> None:
    """Without barriers there are some: the comparison is not blind."""
    environment = {**os.environ, "LD_PRELOAD": _library(), "TSAN_OPTIONS": "report_signal_unsafe=0 history_size=4 exitcode=0"}
    # ThreadSanitizer does not bear every layout of the address space (setarch -R fixes it).
    run = ["setarch", "-R", sys.executable, str(HERE / "kernel_races_run.py"), str(tmp_path), barriers]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, check=False)
    if "sampled" not in done.stdout and "personality" in done.stderr:
        pytest.skip("this machine does not let setarch fix the address space")
    assert "sampled" in done.stdout, done.stderr
    races = [line for line in done.stderr.splitlines() if line.startswith("SUMMARY") and "/kernels/" in line]
    assert bool(races) is (barriers == "without"), races
