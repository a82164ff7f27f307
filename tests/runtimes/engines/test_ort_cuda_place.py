"""What the CUDA engine says when it cannot run: this machine's own faults for real, placements as ONNX Runtime reports them."""

from __future__ import annotations

import ctypes.util
import re
import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper
from toy_bundle import toy_bundle
from toy_decoder import Toy

from vlm_edge_runtime.engines import open_engine, ort_cuda_place
from vlm_edge_runtime.engines.ort_cuda_memory import CudaMemory, HostMemory, checked, runtime_api
from vlm_edge_runtime.engines.ort_cuda_models import greedy_sampler
from vlm_edge_runtime.engines.ort_cuda_place import Place, check_placement, check_wheel, host_place, wheel_cuda_version
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
        r"^DeviceError device=\"cuda\" needs ONNX Runtime with CUDA.*pip install onnxruntime-gpu$", done.stdout.strip()
    )


def test_graphs_that_partly_run_elsewhere_are_refused() -> None:
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    shapes = [(cuda, "MatMul", "mm"), (cpu, "Shape", "s"), (cpu, "Gather", "g"), (cpu, "Concat", "c")]
    check_placement("vision_encoder", cuda, shapes)
    with pytest.raises(DeviceError) as caught:
        check_placement("vision_encoder", cuda, [*shapes, (cpu, "GridSample", "/warp"), (cpu, "NonZero", "n")])
    assert "graph 'vision_encoder': 2 of 6 nodes have no kernel in CUDAExecutionProvider" in str(caught.value)
    assert "GridSample '/warp'" in str(caught.value)


def test_placements_are_read_from_the_session_on_the_cpu_provider() -> None:
    """A place that takes itself for another provider sees each of its nodes elsewhere: the check reads what really happened."""
    info = (
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"]),
    )
    graph = helper.make_graph([helper.make_node("Erf", ["x"], ["y"], name="bend")], "g", info[:1], info[1:])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()
    session, reason = host_place().session(model, "bent", captured=True)
    assert reason == "not asked for" and session.run(None, {"x": np.zeros(2, np.float32)})[0].tolist() == [0, 0]
    with pytest.raises(DeviceError, match=r"graph 'broken' cannot be loaded by CPUExecutionProvider"):
        host_place().session(b"nonsense", "broken")
    subgraphs = session.get_provider_graph_assignment_info()
    placed = [(one.ep_name, node.op_type, node.name) for one in subgraphs for node in one.get_nodes()]
    assert placed == [("CPUExecutionProvider", "Erf", "bend")]
    with pytest.raises(DeviceError, match="first Erf 'bend'"):
        check_placement("bent", "CUDAExecutionProvider", placed)


@needs_cpu_wheel
def test_a_provider_that_onnxruntime_leaves_out_is_an_error() -> None:
    """ONNX Runtime warns and goes on without the provider: here it is the CPU wheel that has none."""
    place = Place("CUDAExecutionProvider", HostMemory())
    with (
        pytest.warns(UserWarning, match="not in available provider names"),
        pytest.raises(DeviceError, match=r"left out CUDAExecutionProvider"),
    ):
        place.session(greedy_sampler(5, "float32"), "small")


def test_the_cpu_wheel_says_no_cuda_version() -> None:
    assert (wheel_cuda_version() is None) == CPU_WHEEL


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


def test_a_provider_library_that_cannot_be_loaded_gives_the_loaders_reason(tmp_path, monkeypatch) -> None:
    """A real library, linked with one that is gone: as the wheel's own is where CUDA's libraries are not installed."""
    capi = tmp_path / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    for name, needs in (
        ("gone", []),
        ("onnxruntime_providers_shared", []),
        ("onnxruntime_providers_cuda", [f"-L{capi}", "-lgone"]),
    ):
        source = tmp_path / f"{name}.c"
        source.write_text(f"int {name}(void) {{ return 0; }}\n")
        command = ["cc", "-shared", "-fPIC", "-Wl,--no-as-needed", str(source), "-o", str(capi / f"lib{name}.so"), *needs]
        subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setattr(onnxruntime, "__file__", str(tmp_path / "onnxruntime" / "__init__.py"))
    (capi / "libgone.so").unlink()
    assert "libgone.so: cannot open shared object file" in ort_cuda_place.provider_load_error()
    monkeypatch.setattr(ort_cuda_place, "open_driver", lambda: 13000)  # made up: the machine has no driver
    with pytest.raises(DeviceError, match=r"cannot be loaded: libgone\.so.*pip install 'onnxruntime-gpu\[cuda,cudnn\]'"):
        ort_cuda_place.check_device()
    (capi / "libonnxruntime_providers_cuda.so").unlink()
    assert "is missing" in ort_cuda_place.provider_load_error()


@needs_no_driver
def test_calls_of_the_cuda_runtime_are_well_formed_without_a_driver() -> None:
    """Every call gets as far as CUDA's own "driver version is insufficient" (35): names and types of arguments are right."""
    cuda = runtime_api()
    with pytest.raises(DeviceError, match=r"cudaStreamCreateWithFlags failed: .*\(error 35\)"):
        CudaMemory()
    memory = CudaMemory.__new__(CudaMemory)
    memory._cuda, memory._kinds, memory.stream = cuda, cuda.cudaMemcpyKind, 0
    array = np.zeros(4, np.float32)
    for call in (
        lambda: memory.upload(4096, array),
        lambda: memory.download(4096, array),
        lambda: memory.copy_lines(4096, 64, 8192, 64, 16, 2),
        lambda: checked(cuda, "cudaMemsetAsync", 4096, 0, 16, 0),
        lambda: memory.allocate(16),  # its own error asks how much is free
    ):
        with pytest.raises(DeviceError, match=r"\(error 35\)"):
            call()
    memory.copy_lines(4096, 64, 8192, 64, 0, 2)  # nothing to copy
    memory.free(4096)


def test_host_memory_copies_lines_and_aligns() -> None:
    memory = HostMemory()
    source, target = memory.allocate(64), memory.allocate(64)
    assert source % 256 == 0
    memory.upload(source, np.arange(64, dtype=np.uint8))
    memory.copy_lines(target + 1, 8, source, 16, 3, 4)
    found = np.empty(64, np.uint8)
    memory.download(target, found)
    expected = np.zeros(64, np.uint8)
    for line in range(4):
        expected[1 + 8 * line : 4 + 8 * line] = np.arange(16 * line, 16 * line + 3)
    np.testing.assert_array_equal(found, expected)
    memory.free(source)
    memory.free(source)
