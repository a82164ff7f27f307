"""Whole sessions over native plans on 1 to 8 threads, and under ThreadSanitizer where `make asan` has built the extension so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from vlm_edge.targets.build import build
from vlm_edge.targets.target import load_target

PROGRAM = Path(__file__).with_name("races_run.py")
BUILT = os.environ.get("VLM_EDGE_TSAN", "")
"""The folder of the instrumented package."""


@pytest.fixture(scope="module")
def bundle(portable_bundle, tmp_path_factory) -> Path:
    """tiny-smolvlm in 4 bits: vision encoder, projector and decoder are plans."""
    path = tmp_path_factory.mktemp("races") / "tiny-smolvlm.vlm"
    shutil.copytree(portable_bundle("tiny-smolvlm"), path)
    target = load_target("cpu-int4")
    options = msgspec.structs.replace(target.options, kernels="native", encoder_kernels="native")
    build(path, msgspec.structs.replace(target, options=options))
    return path


def ran(bundle: Path, threads: range, **environment: str) -> None:
    command = [sys.executable, str(PROGRAM), str(bundle), *map(str, threads)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    assert done.stdout == "ran\n"


@pytest.mark.skipif(bool(BUILT), reason="the instrumented extension does this")
def test_every_number_of_threads_gives_the_same_tokens(bundle):
    ran(bundle, range(1, 9))


@pytest.mark.skipif(not BUILT, reason="`make asan` builds the extension for it")
def test_sessions_are_free_of_races(bundle):
    def library(name: str) -> str:
        return subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()

    ran(
        bundle,
        range(1, 5),
        LD_PRELOAD=":".join(map(library, ("libtsan.so", "libstdc++.so"))),
        PYTHONPATH=BUILT,
        # Python and ONNX Runtime are not instrumented: what their own threads do to their own memory is not seen rightly.
        TSAN_OPTIONS="ignore_noninstrumented_modules=1:exitcode=66",
    )
