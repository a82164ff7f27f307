"""What the seam does with an engine once TensorRT has loaded it, on a stand-in for the modules `tensorrt` and `tensorrt_rtx`.

The stand-in's classes have the names and arguments of the real ones (test_tensorrt_engine compares the names); its engines are
ONNX Runtime sessions, and it refuses what the real ones refuse: runs without scratch memory, shapes outside a profile.
"""

from __future__ import annotations

import enum
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from host_device import HostContext, HostDevice, HostProgram
from host_engine import toy_bench, toy_engine
from host_kernels import HostKernels
from toy_decoder import Toy

from vlm_edge_runtime.engines.tensorrt import TensorRTEngine
from vlm_edge_runtime.engines.tensorrt_program import Profile
from vlm_edge_runtime.engines.tensorrt_seam import MODULES, Runtime
from vlm_edge_runtime.errors import DeviceError

TYPES = {"float32": "FLOAT", "float16": "HALF", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}


class StandInContext:
    def __init__(self, engine: StandInEngine, allocation: object, config: StandInConfig | None) -> None:
        assert allocation is StandInTensorRT.ExecutionContextAllocationStrategy.USER_MANAGED
        self.engine, self.config, self.profile = engine, config, 0
        self.scratch = (0, 0)
        self.inner = HostContext(engine.program, 0)

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        self.scratch = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = profile_index
        self.inner = HostContext(self.engine.program, profile_index)
        return profile_index < self.engine.num_optimization_profiles and stream_handle == 7

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert isinstance(shape, tuple)
        try:
            self.inner.set_shape(name, shape)
        except DeviceError as error:
            self.engine.logger.log(StandInTensorRT.ILogger.ERROR, f"IExecutionContext::setInputShape: {error}")
            return False
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.program.tensors:
            return False
        self.inner.set_address(name, memory)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1,) if self.engine.data_dependent else self.inner.output_shape(name)

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self.scratch[1] < self.engine.device_memory_size_v2 or self.engine.refuses:
            self.engine.logger.log(StandInTensorRT.ILogger.ERROR, "IExecutionContext::enqueueV3: no memory")
            return False
        if self.config is not None:
            self.config.cache.kernels.add(self.engine.name)
        self.inner.enqueue(stream_handle)
        return True


class RtxContext(StandInContext):
    def is_stream_capturable(self, stream: int) -> bool:
        return stream == 7


class StandInCache:
    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def serialize(self) -> bytes:
        return b"cache:" + ",".join(sorted(self.kernels)).encode()

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"cache:"):
            return False
        self.kernels = set(blob.removeprefix(b"cache:").decode().split(","))
        return True

    def reset(self) -> None:
        self.kernels = set()


class StandInConfig:
    def __init__(self) -> None:
        self.cache, self.allocation = StandInCache(), None
        self.dynamic_shapes_kernel_specialization_strategy = self.cuda_graph_strategy = None

    def create_runtime_cache(self) -> StandInCache:
        return StandInCache()

    def set_runtime_cache(self, cache: StandInCache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: object) -> None:
        self.allocation = strategy


class StandInEngine:
    """`ICudaEngine`, TensorRT 10.3's part."""

    device_memory_size_v2 = 4096
    refuses = data_dependent = False

    def __init__(self, name: str, program: HostProgram, logger: object) -> None:
        self.name, self.program, self.logger = name, program, logger
        self.num_io_tensors = len(program.tensors)
        self.num_optimization_profiles = max(1, len(program.profiles))
        self.contexts: list[StandInContext] = []

    def get_tensor_name(self, index: int) -> str:
        return list(self.program.tensors)[index]

    def get_tensor_dtype(self, name: str) -> object:
        return types.SimpleNamespace(name=TYPES[self.program.tensors[name].dtype])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.program.tensors[name].shape

    def get_tensor_mode(self, name: str) -> object:
        modes = StandInTensorRT.TensorIOMode
        return modes.INPUT if self.program.tensors[name].is_input else modes.OUTPUT

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert self.program.tensors[name].is_input
        if not self.program.profiles:
            shape = self.program.tensors[name].shape
            return [tuple(bound if size == -1 else size for size in shape) for bound in (1, 1, 4096)]
        profile = self.program.profiles[profile_index]
        return [profile.smallest[name], profile.smallest[name], profile.largest[name]]

    def create_execution_context(self, strategy: object) -> StandInContext:
        self.contexts.append(StandInContext(self, strategy, None))
        return self.contexts[-1]


class RtxEngine(StandInEngine):
    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.program.alias(name)

    def create_runtime_config(self) -> StandInConfig:
        return StandInConfig()

    def create_execution_context(self, runtime_config: object) -> StandInContext:
        assert isinstance(runtime_config, StandInConfig)
        self.contexts.append(RtxContext(self, runtime_config.allocation, runtime_config))
        return self.contexts[-1]


class StandInTensorRT(types.ModuleType):
    __version__ = "10.3.0.26"

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

        def log(self, severity: int, msg: str) -> None:
            raise NotImplementedError

    class TensorIOMode(enum.Enum):
        NONE, INPUT, OUTPUT = range(3)

    class ExecutionContextAllocationStrategy(enum.Enum):
        STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)

    class DynamicShapesKernelSpecializationStrategy(enum.Enum):
        LAZY, EAGER, NONE = range(3)

    class CudaGraphStrategy(enum.Enum):
        DISABLED, WHOLE_GRAPH_CAPTURE = range(2)

    device: HostDevice
    engines: dict[str, StandInEngine]
    two_profiles = False

    def runtime(self, logger: ILogger) -> types.SimpleNamespace:
        """The class `Runtime`."""
        return types.SimpleNamespace(deserialize_cuda_engine=lambda data: self._load(bytes(data), logger))

    def _load(self, data: bytes, logger: ILogger) -> StandInEngine | None:
        if len(data) < 100:
            logger.log(self.ILogger.WARNING, "a remark")
            logger.log(self.ILogger.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: magic tag does not match")
            return None
        program = HostProgram(data, self.device)
        rtx = self.__name__ == "tensorrt_rtx"
        program.in_place = rtx
        name = "decoder" if "inputs_embeds" in program.tensors and program.tensors["inputs_embeds"].is_input else "embed"
        if self.two_profiles and name == "decoder":
            program.profiles = [
                Profile({}, {}),
                Profile({}, {}),
            ]
            for index, (low, high) in enumerate((((1, 1), (1, 16)), ((1, 1), (8, 1)))):
                shapes: tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]] = ({}, {})
                for tensor in program.session.get_inputs():
                    for side, sizes in zip(shapes, (low, high), strict=True):
                        named = {"batch": sizes[0], "sequence": sizes[1]}
                        side[tensor.name] = tuple(named.get(dim, dim) for dim in tensor.shape)
                program.profiles[index] = Profile(*shapes)
        kind = RtxEngine if rtx else StandInEngine
        self.engines[name] = kind(name, program, logger)
        return self.engines[name]


@pytest.fixture(scope="module", name="kernels")
def _kernels(tmp_path_factory) -> HostKernels:
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"], name="module")
def _module(request, monkeypatch, tmp_path) -> StandInTensorRT:
    module = StandInTensorRT(MODULES[request.param])
    module.engines = {}
    module.Runtime = module.runtime  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULES[request.param], module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return module


def _engine(module: StandInTensorRT, kernels: HostKernels, folder: Path) -> TensorRTEngine:
    rtx = module.__name__ == "tensorrt_rtx"
    engine = toy_engine(folder / "toy", kernels, Toy(), native=rtx)
    for entry in engine.build.engines:
        entry.builder_version = module.__version__
    module.device = HostDevice(kernels, folder)
    return TensorRTEngine(engine.bundle, module.device, Runtime("tensorrt-rtx" if rtx else "tensorrt"))


@pytest.mark.parametrize("two", [False, True], ids=["one profile", "two profiles"])
def test_a_toy_decodes_through_the_seam_on_a_stand_in_tensorrt(module, kernels, tmp_path, two) -> None:
    module.two_profiles = two
    engine = _engine(module, kernels, tmp_path)
    bench = toy_bench(engine, Toy())
    state = bench.filled()
    assert [row.tokens for row in state.decode(8)] == [bench.expected(row, 8) for row in range(3)]
    rtx = module.__name__ == "tensorrt_rtx"
    assert engine.step_counts.captured == (6 if rtx else 5) and engine.decoder().signature.in_place is rtx  # type: ignore[attr-defined]
    contexts = module.engines["decoder"].contexts
    assert [context.profile for context in contexts] == ([0, 1] if two else [0, 0]), "rows by themselves, and steps"
    assert len({context.scratch for context in contexts}) == 1, "contexts share their scratch memory"
    if rtx:
        kinds = StandInTensorRT.DynamicShapesKernelSpecializationStrategy
        found = [context.config.dynamic_shapes_kernel_specialization_strategy for context in contexts if context.config]
        assert found == [kinds.LAZY, kinds.EAGER]
        assert all(
            context.config.cuda_graph_strategy is StandInTensorRT.CudaGraphStrategy.DISABLED
            for context in contexts
            if context.config
        )
    engine.close()
    assert not module.device.live
    caches = list((tmp_path / "cache").rglob("*.cache"))
    assert len(caches) == (2 if rtx else 0), "what was compiled for the GPU is kept, for each engine"


def test_a_runtime_cache_is_used_again_and_a_foreign_one_replaced(module, kernels, tmp_path) -> None:
    if module.__name__ != "tensorrt_rtx":
        pytest.skip("TensorRT has none")
    for content in (None, b"cache:decoder", b"of another GPU"):
        for path in (tmp_path / "cache").rglob("*.cache"):
            if content is not None:
                path.write_bytes(content)
        engine = _engine(module, kernels, tmp_path / str(content))
        toy_bench(engine, Toy()).filled().decode(3)
        used = module.engines["decoder"].contexts[0].config.cache.kernels  # type: ignore[union-attr]
        assert used >= {"decoder"}
        engine.close()
        assert b"cache:decoder" in [path.read_bytes() for path in (tmp_path / "cache").rglob("*.cache")]


def test_refusals_carry_tensorrts_words(module, kernels, tmp_path) -> None:
    engine = _engine(module, kernels, tmp_path)
    graph = engine.graph("embed_tokens")
    with pytest.raises(DeviceError, match=r"'input_ids' \[1, 5000\] is outside \[1, 1\] … \[4096, 4096\]"):
        graph.run({"input_ids": np.zeros((1, 5000), np.int64)})
    module.engines["embed"].refuses = True
    with pytest.raises(DeviceError, match=r"could not be queued \(IExecutionContext::enqueueV3: no memory\)\.$"):
        graph.run({"input_ids": np.zeros((1, 5), np.int64)})
    module.engines["embed"].refuses, module.engines["embed"].data_dependent = False, True
    with pytest.raises(DeviceError, match=r"the shape of 'inputs_embeds' depends on values \(\[-1\]\)"):
        graph.run({"input_ids": np.zeros((1, 5), np.int64)})


def test_an_engine_file_that_tensorrt_does_not_take(module, kernels, tmp_path) -> None:
    engine = _engine(module, kernels, tmp_path)
    for entry in engine.build.engines:
        if entry.role == "decoder":
            path = engine.bundle.path / entry.file.file
            path.write_bytes(b"short")
            entry.file = type(entry.file)(file=entry.file.file, sha256="", bytes=5)
    with pytest.raises(
        DeviceError, match=r"cannot load .* on stand-in \(IRuntime::deserializeCudaEngine: Error Code 1: magic tag"
    ):
        engine.decoder().allocate(1, 8)
    for entry in engine.build.engines:
        entry.builder_version = "8.6.1.6"
    with pytest.raises(
        DeviceError, match=r"was built with tensorrt.* 8\.6\.1\.6, installed is 10\.3\.0\.26, which cannot read it: run"
    ):
        TensorRTEngine(engine.bundle, module.device, engine._runtime)
