"""What `build` writes for TensorRT is what the runtime reads: real builds, their engines replaced by their graphs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from host_device import HostDevice, HostProgram
from host_engine import engine_entry
from host_kernels import HostKernels
from PIL import Image

from vlm_edge.targets.backend import CompileOptions
from vlm_edge.targets.build import build
from vlm_edge_runtime import VisionLanguageModel, load
from vlm_edge_runtime.bundle.manifest import Build
from vlm_edge_runtime.bundle.reader import Bundle, open_bundle, read_manifest
from vlm_edge_runtime.engines.cuda_device import Device
from vlm_edge_runtime.engines.tensorrt import TensorRTEngine
from vlm_edge_runtime.engines.tensorrt_program import Program
from vlm_edge_runtime.sessions.load import choose_build


class GraphRuntime:
    """Loads, in place of an engine file, the graph that it was compiled from."""

    def __init__(self, bundle: Bundle) -> None:
        assert bundle.build is not None
        self._entries = {str(bundle.path / one.file.file): one for one in bundle.build.engines}
        self._bundle = bundle

    def check_version(self, built_with: str, where: str, again: str) -> None:
        pass

    def load(self, path: Path, device: Device, *, key: str, again: str) -> Program:
        entry = self._entries[str(path)]
        program = HostProgram(str(self._bundle.graph_path(entry.graph)), device)  # type: ignore[arg-type]
        program.alias = entry.aliases.get  # type: ignore[method-assign]
        return program


@pytest.mark.slow
@pytest.mark.parametrize(("target", "sm"), [("rtx-40", 89), ("jetson-orin-nano-jp62", 87)])
def test_a_real_build_runs_on_stand_ins(portable_bundle, tmp_path, target, sm) -> None:
    path = tmp_path / "llava.vlm"
    shutil.copytree(portable_bundle("tiny-llava"), path)
    made = build(path, target, precision="fp16", compiling=CompileOptions(context=(64, 128), make=sm == 89))
    opened = open_bundle(path, build=target)
    assert opened.build is not None
    if not made.engines:  # they are made on the device
        opened.build.engines = [
            msgspec.structs.replace(engine_entry(name, entry), sm=[sm]) for name, entry in made.graphs.items()
        ]
    device = HostDevice(HostKernels(tmp_path), tmp_path, sm=sm)
    engine = TensorRTEngine(opened, device, GraphRuntime(opened))
    mine, reference = VisionLanguageModel(opened, engine), load(path, build="portable")
    assert isinstance(reference, VisionLanguageModel) and mine.context_length == 128
    assert engine.decoder().signature.in_place is (sm == 89)  # type: ignore[attr-defined]
    random = np.random.default_rng(3)
    for _ in range(2):
        picture = Image.fromarray(random.integers(0, 256, (48, 48, 3), np.uint8))
        found = [one.generate("What is in the picture?", images=[picture], max_new_tokens=10) for one in (mine, reference)]
        assert found[0].tokens == found[1].tokens  # fp16 against fp32, on a trained model
    assert engine.step_counts.captured > 0


def test_among_builds_for_several_gpus_the_one_for_this_machines_is_taken(portable_bundle, tmp_path, monkeypatch) -> None:
    manifest = read_manifest(portable_bundle("tiny-llava"))
    entry = engine_entry("decoder", manifest.graphs["decoder"])
    for name, sm in (("rtx-30", 86), ("rtx-40", 89)):
        engines = [msgspec.structs.replace(entry, sm=[sm])]
        manifest.builds[name] = Build(name=name, target=name, backend="tensorrt-rtx", precision={}, graphs={}, engines=engines)
    for here, chosen in ((89, "rtx-40"), (86, "rtx-30"), (120, "rtx-30"), (None, "rtx-30")):
        monkeypatch.setattr("vlm_edge_runtime.engines.cuda_driver.local_sm", lambda here=here: here)
        assert choose_build(tmp_path, manifest, "tensorrt-rtx") == chosen


_LOAD = "import sys; from vlm_edge_runtime import load; load(sys.argv[1], device=sys.argv[2])"


def test_a_gpu_build_without_a_gpu_is_refused_in_one_sentence(portable_bundle, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("cuda.bindings.driver")
    path = tmp_path / "llava.vlm"
    shutil.copytree(portable_bundle("tiny-llava"), path)
    build(path, "rtx-40", compiling=CompileOptions(context=(64,), make=False))
    for device in ("tensorrt-rtx", "auto"):
        done = subprocess.run([sys.executable, "-c", _LOAD, str(path), device], capture_output=True, text=True, check=False)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode != 0 and last.startswith("vlm_edge_runtime.errors.DeviceError: this machine has no NVIDIA driver")
