"""What the CUDA engine says when it cannot run: this machine's own faults for real, placements as ONNX Runtime reports them."""

from __future__ import annotations

import ctypes.util
import re
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper
from toy_bundle import toy_bundle
from toy_decoder import Toy

from vlm_edge_runtime import _native
from vlm_edge_runtime.engines import open_engine, ort_cuda_place
from vlm_edge_runtime.engines.ort_cuda_place import Place, check_placement, check_provider, check_wheel, wheel_cuda_version
from vlm_edge_runtime.errors import DeviceError

CPU_WHEEL = "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
NO_DRIVER = ctypes.util.find_library("cuda") is None

needs_cpu_wheel = pytest.mark.skipif(not CPU_WHEEL, reason="onnxruntime-gpu is installed here")
needs_no_driver = pytest.mark.skipif(not NO_DRIVER, reason="this machine has an NVIDIA driver")


@needs_cpu_wheel
@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_the_cpu_wheel_is_named_and_what_to_install(tmp_path, device) -> None:
    bundle = toy_bundle(tmp_path, Toy(), "lowered", backend="ort-cuda")
    with pytest.raises(DeviceError) as caught:
        open_engine(bundle, device)
    message = str(caught.value)
    assert f"onnxruntime {onnxruntime.__version__} is the CPU wheel" in message
    assert "pip install onnxruntime-gpu" in message and "side by side" in message
    assert "\n" not in message


def test_a_cuda_build_is_not_run_on_the_cpu(tmp_path) -> None:
    with pytest.raises(DeviceError, match=r"runs on device 'cuda', 'cpu' was asked for"):
        open_engine(toy_bundle(tmp_path, Toy(), "lowered", backend="ort-cuda"), "cpu")
    with pytest.raises(DeviceError, match=r"runs on device 'cpu', 'cuda' was asked for"):
        open_engine(toy_bundle(tmp_path, Toy(), "lowered"), "cuda")


@needs_cpu_wheel
def test_both_wheels_beside_each_other_are_found(tmp_path, monkeypatch) -> None:
    metadata = tmp_path / "onnxruntime_gpu-1.31.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        DeviceError, match=r"onnxruntime and onnxruntime-gpu are both installed.*pip uninstall onnxruntime onnxruntime-gpu"
    ):
        check_wheel()


def test_onnxruntime_that_is_not_there(tmp_path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from vlm_edge_runtime.engines.ort_cuda_place import check_wheel\n"
        "try: check_wheel()\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert re.search(
        r"^DeviceError device=\"cuda\" needs ONNX Runtime with CUDA.*is not installed.*pip install onnxruntime-gpu$",
        done.stdout.strip(),
    )


def test_graphs_that_partly_run_elsewhere_are_refused() -> None:
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    shapes = [(cuda, "MatMul", "mm"), (cpu, "Shape", "s"), (cpu, "Gather", "g"), (cpu, "Concat", "c")]
    check_placement("vision_encoder", cuda, shapes)
    with pytest.raises(DeviceError) as caught:
        check_placement("vision_encoder", cuda, [*shapes, (cpu, "GridSample", "/warp"), (cpu, "NonZero", "n")])
    assert "graph 'vision_encoder': 2 of 6 nodes have no kernel in CUDAExecutionProvider" in str(caught.value)
    assert "GridSample '/warp'" in str(caught.value)


def test_placements_are_read_from_the_session_on_the_cpu_provider(place) -> None:
    """A place that takes itself for another provider sees each of its nodes elsewhere: the check reads what really happened."""
    info = (
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"]),
    )
    graph = helper.make_graph([helper.make_node("Erf", ["x"], ["y"], name="bend")], "g", info[:1], info[1:])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()
    session, reason = place().session(model, "bent", captured=True)
    assert reason == "not asked for" and np.asarray(session.run({"x": np.zeros(2, np.float32)})["y"]).tolist() == [0, 0]
    with pytest.raises(DeviceError, match=r"graph 'broken' cannot be loaded by CPUExecutionProvider"):
        place().session(b"nonsense", "broken")
    placed = _native.session_placement(session)
    assert placed == [("CPUExecutionProvider", "Erf", "bend")]
    with pytest.raises(DeviceError, match="first Erf 'bend'"):
        check_placement("bent", "CUDAExecutionProvider", placed)


@needs_cpu_wheel
def test_the_library_of_the_cpu_wheel_has_no_cuda_provider(place) -> None:
    """Its own refusal, to a place that asks for the provider with all of an engine's options."""
    options = {"device_id": "0", "user_compute_stream": "4096", "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    with pytest.raises(DeviceError) as caught:
        check_provider(Place(place().device, options, cuda_graphs=True))
    said = "graph 'first_graph' cannot be loaded by CUDAExecutionProvider: CUDA execution provider is not enabled in this build."
    assert str(caught.value) == said


def test_a_made_up_loaders_error_says_what_to_install(place, monkeypatch) -> None:
    """The words are ONNX Runtime's own (1.31.1 of onnxruntime-gpu, where CUDA's libraries are missing)."""
    words = "x.cc:2043 Get() FAIL : Failed to load library /a/b.so with error: libcublasLt.so.13: cannot open shared object file"

    class Failing(Place):
        def session(self, model, role, *, captured=False):
            raise DeviceError(f"graph '{role}' cannot be loaded by {self.provider}: {words}")

    with pytest.raises(
        DeviceError, match=r"cannot be loaded: libcublasLt\.so\.13: .*pip install 'onnxruntime-gpu\[cuda,cudnn\]'"
    ):
        check_provider(Failing(place().device, {}))


def test_the_cpu_wheel_says_no_cuda_version() -> None:
    assert (wheel_cuda_version() is None) == CPU_WHEEL


def test_the_wheels_cuda_version_is_read_and_not_imported(tmp_path, monkeypatch) -> None:
    (tmp_path / "build_and_package_info.py").write_text("package_name = 'onnxruntime-gpu'\ncuda_version = '13.0'\n")
    monkeypatch.setattr(ort_cuda_place, "find_library", lambda: tmp_path / "libonnxruntime.so")
    assert wheel_cuda_version() == (13, 0)


@needs_no_driver
def test_a_machine_without_a_driver_is_named() -> None:
    with pytest.raises(DeviceError, match=r'no NVIDIA driver.*device="cpu"'):
        ort_cuda_place.check_device()


def test_a_made_up_driver_older_than_the_wheels_cuda_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(ort_cuda_place, "open_driver", lambda: 12040)
    monkeypatch.setattr(ort_cuda_place, "wheel_cuda_version", lambda: (13, 0))
    with pytest.raises(
        DeviceError, match=r"too old: it serves CUDA 12\.4, onnxruntime-gpu is built for CUDA 13\.0: update the driver"
    ):
        ort_cuda_place.check_device()
