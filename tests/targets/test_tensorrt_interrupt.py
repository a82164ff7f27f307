"""A build that is killed or interrupted while TensorRT compiles: what was finished stays, nothing is half there."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from engine_builds import Remembered

from vlm_edge.targets.backend import CompileOptions
from vlm_edge.targets.build import build
from vlm_edge_runtime.bundle import engine_files
from vlm_edge_runtime.bundle.engine_files import engine_folder, sweep_engines
from vlm_edge_runtime.bundle.reader import open_bundle, read_manifest
from vlm_edge_runtime.errors import BundleError

LINE = "COMPILING"
SCRIPT = f"""
import os, signal, sys, time
from vlm_edge.cli import console
from vlm_edge.targets.tensorrt import engines
import vlm_edge_runtime.bundle.engine_files as files

class Telling(console.DrawnProgress):
    def start(self, step, total=None):
        super().start(step, total)
        if step.startswith("engine decoder"):
            print("{LINE}", flush=True)

console.DrawnProgress = Telling
if sys.argv[3] == "writing":
    real = os.fsync
    def fsync(handle):
        if ".decoder.c128.sm89.engine." in os.readlink(f"/proc/self/fd/{{handle}}"):
            print("{LINE}", flush=True)
            time.sleep(600)
        real(handle)
    console.DrawnProgress = Telling.__base__
    files.os.fsync = fsync
from vlm_edge.cli.main import main
main(["build", sys.argv[1], "--target", "rtx-40", "--context", sys.argv[2]])
"""


@contextlib.contextmanager
def building(bundle, where="compiling"):
    """A real `vlm-edge build` in a process of its own, at the point where its decoder is being compiled (or written)."""
    command = [sys.executable, "-c", SCRIPT, str(bundle), "128", where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.strip() == LINE:
                break
        else:
            pytest.fail(f"the build never came to its decoder: {process.stderr.read()}")
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def check_unharmed(bundle):
    """The engines before the decoder's are there and whole, and the decoder's is not."""
    made = read_manifest(bundle).builds["rtx-40"]
    assert [one.graph for one in made.engines] == ["vision_encoder", "projector", "embed_tokens"]
    open_bundle(bundle, build="rtx-40")


def check_goes_on(bundle):
    """The next build compiles the decoder alone, and leaves nothing else lying about."""
    seen = Remembered()
    build(bundle, "rtx-40", compiling=CompileOptions(context=(128,)), progress=seen)
    assert [graph for graph, detail in seen.engines().items() if detail != "unchanged"] == ["decoder.c128"]
    files = {path.name for path in engine_folder(bundle, "rtx-40").iterdir()}
    assert files == {f"{graph}.sm89.engine" for graph in ("vision_encoder", "projector", "embed_tokens", "decoder.c128")}
    open_bundle(bundle, build="rtx-40")


def test_killed_while_compiling(vlm_bundle):
    with building(vlm_bundle) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    check_unharmed(vlm_bundle)
    check_goes_on(vlm_bundle)


def test_killed_while_writing(vlm_bundle):
    """As when the power goes: a part of the engine is on the disk, under a name that nobody takes for an engine."""
    with building(vlm_bundle, "writing") as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    left = [path for path in engine_folder(vlm_bundle, "rtx-40").iterdir() if path.name.endswith(".partial")]
    assert len(left) == 1 and left[0].stat().st_size > 0
    check_unharmed(vlm_bundle)
    check_goes_on(vlm_bundle)


def test_interrupted_while_compiling(vlm_bundle):
    """Ctrl-C: TensorRT is asked to stop, the command says so, and its exit code is that of an interrupt."""
    with building(vlm_bundle) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "nothing half-written was left behind" in process.stderr.read()
    check_unharmed(vlm_bundle)
    assert not [path for path in engine_folder(vlm_bundle, "rtx-40").iterdir() if path.suffix != ".engine"]
    check_goes_on(vlm_bundle)


def test_files_of_a_process_at_work_are_left_alone(vlm_bundle):
    made = build(vlm_bundle, "rtx-40", compiling=CompileOptions(make=False))
    folder = engine_folder(vlm_bundle, "rtx-40")
    folder.mkdir()
    mine, gone, unknown = (
        folder / name
        for name in (
            f".projector.sm89.engine.{os.getpid()}.partial",
            ".projector.sm89.engine.999999999.partial",
            "old.sm89.engine",
        )
    )
    for path in (mine, gone, unknown):
        path.write_bytes(b"part")
    sweep_engines(vlm_bundle, made)
    assert list(folder.iterdir()) == [mine]


def test_a_full_disk(vlm_bundle, monkeypatch):
    """The engine that does not fit leaves no part of itself; those before it stay."""
    real = os.fsync

    def full(handle):
        if Path(f"/proc/self/fd/{handle}").readlink().name.startswith(".projector.sm89.engine."):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(engine_files.os, "fsync", full)
    with pytest.raises(BundleError, match="no space left while building rtx-40"):
        build(vlm_bundle, "rtx-40", compiling=CompileOptions(context=(128,)))
    assert [path.name for path in engine_folder(vlm_bundle, "rtx-40").iterdir()] == ["vision_encoder.sm89.engine"]
    assert [one.graph for one in read_manifest(vlm_bundle).builds["rtx-40"].engines] == ["vision_encoder"]
