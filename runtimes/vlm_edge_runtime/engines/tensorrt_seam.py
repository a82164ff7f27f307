"""The one place of the runtime that imports `tensorrt` or `tensorrt_rtx`: engines from disk to something that runs.

Both have one Python API. TensorRT-RTX also compiles kernels for the GPU when a context is made or first run; what it compiled is
kept in a runtime cache, a file for each engine, GPU, driver and version (docs.nvidia.com/deeplearning/tensorrt-rtx, "Runtime
cache").
"""

from __future__ import annotations

import hashlib
import importlib
import platform
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from vlm_edge_runtime import _native
from vlm_edge_runtime.errors import DeviceError

from .cuda_device import Device, Memory
from .cuda_kernels import cache_folder, write_atomically
from .tensorrt_program import Context, Profile, Shape, TensorInfo

Flavour = Literal["tensorrt", "tensorrt-rtx"]
MODULES: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_INSTALL = {
    "tensorrt": "install NVIDIA's tensorrt (on a Jetson it comes with JetPack: sudo apt install python3-libnvinfer)",
    "tensorrt-rtx": "pip install 'vlm-edge[tensorrt-rtx]'",
}
_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}


def platform_tag() -> str:
    """Operating system and architecture as engines name them: `linux-x86_64`."""
    return f"{platform.system()}-{platform.machine()}".lower()


class Runtime:
    """TensorRT or TensorRT-RTX, imported. Raises DeviceError when it is not installed or does not load."""

    def __init__(self, flavour: Flavour) -> None:
        name = MODULES[flavour]
        try:
            self.module: ModuleType = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise DeviceError(
                f"device '{flavour}' needs the Python package {name}, which is not installed: {_INSTALL[flavour]}."
            ) from None
        except (ImportError, OSError) as error:
            raise DeviceError(f"{name} is installed but does not load ({error}): {_INSTALL[flavour]}.") from error
        self.flavour = flavour
        self.version = str(self.module.__version__)
        self._said: deque[str] = deque(maxlen=4)
        self._logger = _listener(self.module, self._said)
        self._runtime = self.module.Runtime(self._logger)

    def check_version(self, built_with: str, where: str, again: str) -> None:
        """Engines are read by the version that wrote them. Raises DeviceError naming both."""
        if _numbers(built_with) != _numbers(self.version):
            raise DeviceError(
                f"{where} was built with {self.flavour} {built_with}, installed is {self.version}, which cannot read it: {again} "
                f"on this device, or install {self.flavour} {built_with}."
            )

    def load(self, path: Path, device: Device, *, key: str, again: str) -> TensorRTProgram:
        """An engine file on the device. `key`: what its runtime cache is kept by. Raises DeviceError with TensorRT's reason."""
        device.use()
        self._said.clear()
        data = path.read_bytes()
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise DeviceError(
                f"{self.flavour} {self.version} cannot load {path} on {device.name}{self._reason()}: the file is damaged, or was "
                f"made for another GPU or version; {again} on this device."
            )
        return TensorRTProgram(self, engine, device, path, key)

    def _reason(self) -> str:
        return f" ({self._said[-1]})" if self._said else ""

    def refused(self, what: str) -> DeviceError:
        """An error with what TensorRT said last."""
        return DeviceError(f"{self.flavour} {self.version}: {what}{self._reason()}.")


class TensorRTProgram:
    """A deserialised engine. Its contexts share one piece of scratch memory, for they run one after another on one stream."""

    def __init__(self, runtime: Runtime, engine: Any, device: Device, path: Path, key: str) -> None:
        self.runtime = runtime
        self.path = path
        self._engine = engine
        self._device = device
        self.tensors: Mapping[str, TensorInfo] = {info.name: info for info in _tensors(runtime.module, engine)}
        self.profiles: Sequence[Profile] = [_profile(engine, self.tensors, i) for i in range(engine.num_optimization_profiles)]
        self._scratch: Memory = device.allocate(int(engine.device_memory_size_v2))
        self._contexts: weakref.WeakSet[TensorRTContext] = weakref.WeakSet()
        self._cache = _RuntimeCache(runtime, engine, device, key) if runtime.flavour == "tensorrt-rtx" else None

    def alias(self, output: str) -> str | None:
        """The input whose memory an output must be given. TensorRT before 10.15 knows none."""
        asked = getattr(self._engine, "get_aliased_input_tensor", None)
        name = asked(output) if asked is not None else None
        return str(name) if name else None

    def context(self, profile: int, *, fixed: bool) -> Context:
        """A context on an optimisation profile."""
        module = self.runtime.module
        managed = module.ExecutionContextAllocationStrategy.USER_MANAGED
        config = None
        if self._cache is not None:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(managed)
            self._cache.give(config)
            strategies = module.DynamicShapesKernelSpecializationStrategy
            # A captured step must not change its kernels afterwards; prompts of ever new lengths must not wait for theirs.
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER if fixed else strategies.LAZY
            config.cuda_graph_strategy = module.CudaGraphStrategy.DISABLED
            made = self._engine.create_execution_context(config)
        else:
            made = self._engine.create_execution_context(managed)
        if made is None:
            raise self.runtime.refused(f"no execution context for {self.path}")
        made.set_device_memory(self._scratch.address, self._scratch.nbytes)
        if len(self.profiles) > 1 and not made.set_optimization_profile_async(profile, self._device.stream):
            raise self.runtime.refused(f"{self.path} has no optimisation profile {profile}")
        context = TensorRTContext(self.runtime, made, self.path, config)
        self._contexts.add(context)
        return context

    def close(self) -> None:
        """Frees contexts, engine and scratch memory, and keeps the runtime cache."""
        if self._engine is None:
            return
        if self._cache is not None:
            self._cache.save()
        self._device.use()
        self._device.synchronize()
        for context in list(self._contexts):
            context.close()
        self._engine = self._cache = None
        self._scratch.close()


class TensorRTContext:
    """One `IExecutionContext`."""

    def __init__(self, runtime: Runtime, context: Any, path: Path, config: Any) -> None:
        self._runtime = runtime
        self._context = context
        self._config = config  # lives as long as the context
        self._path = path

    def set_shape(self, name: str, shape: Shape) -> None:
        """An input's shape."""
        if not self._context.set_input_shape(name, shape):
            raise self._runtime.refused(f"{self._path} does not take '{name}' of shape {list(shape)}")

    def set_address(self, name: str, address: int) -> None:
        """A tensor's memory."""
        if not self._context.set_tensor_address(name, address):
            raise self._runtime.refused(f"{self._path} does not take an address for '{name}'")

    def set_total(self, entries: int) -> None:
        """TensorRT's decoders read the rows' lengths on the device."""

    def output_shape(self, name: str) -> Shape:
        """An output's shape under the inputs' shapes."""
        shape = tuple(int(size) for size in self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise DeviceError(
                f"{self._path}: the shape of '{name}' depends on values ({list(shape)}), which this runtime does not serve."
            )
        return shape

    def enqueue(self, stream: int) -> None:
        """Queues a run."""
        if not self._context.execute_async_v3(stream):
            raise self._runtime.refused(f"a run of {self._path} could not be queued")

    def capturable(self, stream: int) -> bool:
        """TensorRT's contexts with fixed shapes are; TensorRT-RTX says."""
        asked = getattr(self._context, "is_stream_capturable", None)
        return bool(asked(stream)) if asked is not None else True

    def frozen(self) -> list[_native.BoundRun]:
        """None: its work is captured."""
        return []

    def close(self) -> None:
        """Frees the context."""
        self._context = self._config = None


class _RuntimeCache:
    """Kernels that TensorRT-RTX compiled for this GPU, kept in a file. A file that does not fit any more is replaced."""

    def __init__(self, runtime: Runtime, engine: Any, device: Device, key: str) -> None:
        parts = "\0".join([key, runtime.version, device.name, str(device.sm), str(device.driver_version)])
        self._path = cache_folder() / "tensorrt-rtx" / f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.cache"
        self._lock = threading.Lock()
        self._kept = b""
        self._config = engine.create_runtime_config()  # lives as long as the cache that it made
        self._cache = self._config.create_runtime_cache()
        if self._path.is_file():
            self._kept = self._path.read_bytes()
            if not self._cache.deserialize(self._kept):
                self._kept = b""
                self._cache.reset()

    def give(self, config: Any) -> None:
        """Makes a context's configuration use the cache."""
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Writes the file if anything was compiled since."""
        with self._lock:
            data = bytes(memoryview(self._cache.serialize()))
            if data and data != self._kept:
                write_atomically(self._path, data)
                self._kept = data


def _listener(module: ModuleType, said: deque[str]) -> Any:
    """An ILogger that keeps errors and warnings; TensorRT calls it from threads of its own."""
    severity = module.ILogger

    class Listener(module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                said.append(" ".join(message.split())[:400])

    return Listener()


def _tensors(module: ModuleType, engine: Any) -> list[TensorInfo]:
    found = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name).name
        if kind not in _TYPES:
            raise DeviceError(
                f"an engine's '{name}' is of type {kind}, which this runtime does not serve; it serves {', '.join(_TYPES)}."
            )
        shape = tuple(int(size) for size in engine.get_tensor_shape(name))
        found.append(TensorInfo(name, _TYPES[kind], shape, engine.get_tensor_mode(name) == module.TensorIOMode.INPUT))
    return found


def _profile(engine: Any, tensors: Mapping[str, TensorInfo], index: int) -> Profile:
    low: dict[str, Shape] = {}
    high: dict[str, Shape] = {}
    for name, info in tensors.items():
        if info.is_input and -1 in info.shape:
            smallest, _, largest = engine.get_tensor_profile_shape(name, index)
            low[name], high[name] = tuple(int(size) for size in smallest), tuple(int(size) for size in largest)
    return Profile(low, high)


def _numbers(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:3])
