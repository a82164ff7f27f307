"""How the TensorRT engine opens builds and runs graphs, and its one clear error for each way that it cannot."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from host_device import HostDevice, HostProgram
from host_engine import VERSION, HostRuntime, device_of, toy_engine
from host_kernels import HostKernels
from onnx import TensorProto, helper
from toy_decoder import Toy

from vlm_edge_runtime.bundle.manifest import EngineEntry, TensorSpec
from vlm_edge_runtime.engines import open_engine, tensorrt_seam
from vlm_edge_runtime.engines.base import Graph
from vlm_edge_runtime.engines.tensorrt import TensorRTEngine
from vlm_edge_runtime.engines.tensorrt_graph import TensorRTGraph
from vlm_edge_runtime.engines.tensorrt_program import Profile
from vlm_edge_runtime.engines.tensorrt_seam import MODULES, Runtime
from vlm_edge_runtime.errors import BundleError, DeviceError


@pytest.fixture(scope="module", name="kernels")
def _kernels(tmp_path_factory) -> HostKernels:
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(name="engine")
def _engine(tmp_path, kernels) -> TensorRTEngine:
    return toy_engine(tmp_path / "toy", kernels, Toy(), buckets=(16, 64))


def _reopened(engine: TensorRTEngine) -> TensorRTEngine:
    return TensorRTEngine(engine.bundle, engine.device, HostRuntime(True))


def _changed(engine: TensorRTEngine, **changes: object) -> TensorRTEngine:
    """Another engine over the build, whose decoder entries are changed."""
    build = engine.build
    build.engines = [
        msgspec.structs.replace(one, **changes) if one.role == "decoder" else one  # type: ignore[arg-type]
        for one in build.engines
    ]
    return _reopened(engine)


def test_the_protocols_are_met(engine) -> None:
    graph = engine.graph("embed_tokens")
    assert isinstance(graph, Graph) and engine.graph("embed_tokens") is graph
    assert [(spec.name, spec.dtype, spec.shape) for spec in graph.inputs] == [("input_ids", "int64", ("batch", "sequence"))]
    decoder = engine.decoder()
    assert decoder is engine.decoder() and (decoder.hidden_size, decoder.vocab_size) == (32, 61)
    assert decoder.embed(np.array([1, 2, 3], np.int64)).shape == (3, 32)
    with pytest.raises(ValueError, match="2 dimensions, expected 1"):
        decoder.embed(np.zeros((1, 2), np.int64))
    assert engine.name == "tensorrt" and engine.kv_budget > 0
    assert len(engine.graph_times()["embed_tokens"]) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sm": [87]},
            r"cannot run decoder\.c16 on SM 86: its engines are for SM 87; run `vlm-edge build .* --target toy` there \(this",
        ),
        ({"platform": "linux-aarch64"}, r"was built on linux-aarch64, this is .*: run `vlm-edge build .*` on this device"),
        ({"graph_sha256": "0"}, r"was compiled from another decoder\.c16\.onnx than the build has now; run"),
    ],
)
def test_engines_that_do_not_fit_here(engine, changes, message) -> None:
    with pytest.raises(DeviceError, match=message):
        _changed(engine, **changes)


def test_a_manifest_that_says_another_capacity(engine) -> None:
    with pytest.raises(
        DeviceError, match="the manifest says 17 cache entries of the decoder's engine, which has 64: build it again"
    ):
        _changed(engine, capacity=17).decoder().allocate(1, 8)


def test_engine_files_that_are_missing_or_damaged(engine) -> None:
    file = engine.bundle.path / "decoder.c16.onnx"
    data = file.read_bytes()
    file.write_bytes(data[:-9])
    with pytest.raises(DeviceError, match=r"decoder\.c16\.onnx is truncated: the engine file is damaged"):
        _reopened(engine)
    file.unlink()
    with pytest.raises(DeviceError, match=r"decoder\.c16\.onnx is missing: run `vlm-edge build .* --target toy` on this device"):
        _reopened(engine)


def test_engines_outside_the_bundle_are_refused(engine) -> None:
    (one, *others) = [entry for entry in engine.build.engines if entry.role == "decoder"]
    outside: EngineEntry = msgspec.structs.replace(one, file=msgspec.structs.replace(one.file, file="../decoder.engine"))
    engine.build.engines = [entry for entry in engine.build.engines if entry.role != "decoder"] + [outside, *others]
    with pytest.raises(BundleError, match="names an engine outside the bundle"):
        _reopened(engine)


def test_builds_without_engines(engine) -> None:
    with pytest.raises(BundleError, match=r"no graph 'vision_encoder'; it has: decoder"):
        engine.graph("vision_encoder")
    engine.build.engines = [one for one in engine.build.engines if one.role != "decoder"]
    with pytest.raises(BundleError, match=r"has no engine of a decoder: run"):
        _reopened(engine).decoder()
    engine.build.engines = []
    with pytest.raises(DeviceError, match=r"has graphs and no engines yet: run `vlm-edge build .* --target toy` on this device"):
        _reopened(engine)


def test_a_gpu_build_never_opens_on_the_cpu(engine) -> None:
    with pytest.raises(DeviceError, match=r"build 'toy' of .* runs on device 'tensorrt', 'cpu' was asked for"):
        open_engine(engine.bundle, "cpu")
    run = [
        sys.executable,
        "-c",
        "import sys; from vlm_edge_runtime.engines.cuda_device import CudaDevice; CudaDevice()",
    ]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin", "LD_LIBRARY_PATH": ""})
    assert done.returncode != 0 and "DeviceError" in done.stderr.strip().splitlines()[-1]


def test_tensorrt_that_is_not_installed(monkeypatch) -> None:
    monkeypatch.setitem(MODULES, "tensorrt", "no_such_tensorrt")
    with pytest.raises(
        DeviceError, match=r"needs the Python package no_such_tensorrt, which is not installed: .*python3-libnvinfer"
    ):
        Runtime("tensorrt")


def test_versions(monkeypatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    runtime = Runtime("tensorrt-rtx")
    runtime.check_version(runtime.version, "x.engine", "run it")
    with pytest.raises(
        DeviceError, match=r"x\.engine was built with tensorrt-rtx 1\.2\.0\.1, installed is .*cannot read it: run it on this"
    ):
        runtime.check_version("1.2.0.1", "x.engine", "run it")


def test_every_name_that_the_seam_uses_is_one_of_tensorrt_rtx() -> None:
    """What is past `deserialize` cannot run here; a misspelt name would show."""
    module = pytest.importorskip("tensorrt_rtx")
    names = {
        module.ICudaEngine: "num_io_tensors get_tensor_name get_tensor_dtype get_tensor_shape get_tensor_mode "
        "num_optimization_profiles get_tensor_profile_shape device_memory_size_v2 get_aliased_input_tensor "
        "create_runtime_config create_execution_context",
        module.IExecutionContext: "set_device_memory set_optimization_profile_async set_input_shape set_tensor_address "
        "get_tensor_shape execute_async_v3 is_stream_capturable",
        module.IRuntimeConfig: "set_execution_context_allocation_strategy dynamic_shapes_kernel_specialization_strategy "
        "cuda_graph_strategy create_runtime_cache set_runtime_cache",
        module.IRuntimeCache: "serialize deserialize reset",
        module.ExecutionContextAllocationStrategy: "USER_MANAGED",
        module.DynamicShapesKernelSpecializationStrategy: "EAGER LAZY",
        module.CudaGraphStrategy: "DISABLED",
        module.DataType: " ".join(tensorrt_seam._TYPES),
    }
    for owner, used in names.items():
        assert [name for name in used.split() if not hasattr(owner, name)] == [], owner
    source = Path(tensorrt_seam.__file__).read_text(encoding="utf-8")
    for used in names.values():
        assert all(name in source for name in used.split())


def test_a_file_that_tensorrt_rtx_refuses(tmp_path, kernels) -> None:
    """The real library; without a GPU it refuses every file, and says why."""
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "decoder.engine"
    path.write_bytes(b"no engine at all" * 64)
    with pytest.raises(
        DeviceError, match=r"tensorrt-rtx 1\..* cannot load .*decoder\.engine on stand-in \(.+\): the file is damaged"
    ):
        Runtime("tensorrt-rtx").load(path, HostDevice(kernels, tmp_path), key="k", again="run `vlm-edge build`")


def _doubled(dtype: int = TensorProto.FLOAT16) -> bytes:
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Cast", ["ids"], ["numbers"], to=dtype),
        helper.make_node("Add", ["x", "x"], ["twice"]),
        helper.make_node("Add", ["twice", "numbers"], ["y"]),
    ]
    given = [info("x", dtype, ["batch", 3]), info("ids", TensorProto.INT32, ["batch", 1])]
    graph = helper.make_graph(nodes, "doubled", given, [info("y", dtype, ["batch", 3])])
    return onnx.helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def _graph(kernels: HostKernels, folder: Path) -> TensorRTGraph:
    import threading

    device = HostDevice(kernels, folder)
    profiles = [
        Profile({"x": (1, 3), "ids": (1, 1)}, {"x": (2, 3), "ids": (2, 1)}),
        Profile({"x": (4, 3), "ids": (4, 1)}, {"x": (8, 3), "ids": (8, 1)}),
    ]
    program = HostProgram(_doubled(), device, profiles)
    inputs = (
        TensorSpec(name="x", dtype="float32", shape=("batch", 3)),
        TensorSpec(name="ids", dtype="int64", shape=("batch", 1)),
        TensorSpec(name="unused", dtype="int64", shape=(1,)),
    )
    outputs = (TensorSpec(name="y", dtype="float32", shape=("batch", 3)),)
    times: deque[float] = deque()
    return TensorRTGraph("projector", program, device, inputs, outputs, times.append, threading.RLock())


def test_graphs_take_and_give_the_portable_types(kernels, tmp_path) -> None:
    graph = _graph(kernels, tmp_path)
    assert [spec.name for spec in graph.inputs] == ["x", "ids"], "an input that the build dropped is not asked for"
    for rows in (2, 1, 5, 2):
        x = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
        y = graph.run({"x": x, "ids": np.full((rows, 1), 7, np.int64)})["y"]
        assert y.dtype == np.float32
        np.testing.assert_array_equal(y, 2 * x + 7)
    assert graph.program.contexts == [(0, False), (1, False)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("feeds", "error", "message"),
    [
        (
            {"x": np.zeros((3, 3), np.float32), "ids": np.zeros((3, 1), np.int64)},
            DeviceError,
            r"'x' \[3, 3\] is outside \[4, 3\] … \[8, 3\]",
        ),
        (
            {"x": np.zeros((2, 4), np.float32), "ids": np.zeros((2, 1), np.int64)},
            DeviceError,
            r"'x' is \[2, 4\], expected \[-1, 3\]",
        ),
        ({"x": np.zeros((2, 3), np.float32)}, DeviceError, "graph 'projector' takes ids, x; given were x"),
        ({"x": np.zeros((2, 3), np.int64), "ids": np.zeros((2, 1), np.int64)}, TypeError, "x is int64, expected float16"),
        ({"x": np.zeros((2, 3), np.float32), "ids": np.full((2, 1), 2**40)}, DeviceError, "'ids' has values outside int32"),
    ],
)
def test_inputs_that_do_not_fit(kernels, tmp_path, feeds, error, message) -> None:
    with pytest.raises(error, match=message):
        _graph(kernels, tmp_path).run(feeds)


def test_a_closed_graph(kernels, tmp_path) -> None:
    graph = _graph(kernels, tmp_path)
    graph.close()
    graph.close()
    with pytest.raises(DeviceError, match="graph 'projector' is closed"):
        graph.run({"x": np.zeros((2, 3), np.float32), "ids": np.zeros((2, 1), np.int64)})


def test_versions_of_every_engine_are_checked(engine) -> None:
    assert engine._runtime.version_checks == [VERSION] * 3
    assert device_of(engine).sm == 86
