"""The one place that knows `tensorrt` and `tensorrt_rtx` apart: which is wanted, which is there, and what each cannot do.

Both have one Python API. What differs, by NVIDIA's documentation (and, for TensorRT-RTX 1.7, as tried):

- TensorRT-RTX compiles ahead of time, on any machine, for the compute capabilities that are named to it; TensorRT compiles for
  the GPU in the machine and nothing else (docs.nvidia.com/deeplearning/tensorrt-rtx, "Ahead-of-time compilation").
- Networks are strongly typed here. TensorRT 10 takes a flag for it, TensorRT-RTX and TensorRT 11 know nothing else and take or
  ignore the flag; EXPLICIT_BATCH is the only mode since 10.0 and its flag is not given (docs.nvidia.com/deeplearning/tensorrt,
  "Migrating from TensorRT 10.x to 11.x"). Builder flags for precisions are gone in 11 and are never set.
- A timing cache is TensorRT's; in TensorRT-RTX its functions do nothing since 1.2, and kernels are tuned when the engine runs.
"""

from __future__ import annotations

import ctypes
import importlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from vlm_edge.targets.target import Target
from vlm_edge_runtime.errors import TargetError

Flavour = Literal["tensorrt", "tensorrt-rtx"]

_MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
AHEAD_OF_TIME_SM = (75, 80, 86, 89, 120, 121)
"""Compute capabilities that TensorRT-RTX compiles for on any machine, without the GPU (1.7)."""
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the CUDA driver API."""


@dataclass(slots=True, frozen=True)
class Gpu:
    """The GPU in this machine: its name and compute capability × 10."""

    name: str
    sm: int


@dataclass(slots=True, frozen=True)
class Library:
    """An imported TensorRT: its module, which of the two it is, and its version (`10.16.1.11`)."""

    module: ModuleType
    flavour: Flavour
    version: str

    @property
    def ahead_of_time(self) -> bool:
        """Whether it compiles for GPUs that are not in this machine."""
        return self.flavour == "tensorrt-rtx"


class NotHere(TargetError):
    """The engines of a target are compiled elsewhere; the message says where and by what command. No fault of the build."""


def platform_tag() -> str:
    """What engines are bound to besides the GPU: operating system and architecture, as `linux-x86_64`."""
    return f"{platform.system()}-{platform.machine()}".lower()


def local_gpu() -> Gpu | None:
    """The first GPU of this machine, or None where there is no NVIDIA driver or no GPU. Asks the CUDA driver alone."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, value, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceGetName(name, 256, device):
        return None
    digits = []
    for attribute in (_MAJOR, _MINOR):
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        digits.append(value.value)
    return Gpu(name=name.value.decode("utf-8", "replace"), sm=digits[0] * 10 + digits[1])


def check_sm(target: Target, sm: Sequence[int]) -> tuple[int, ...]:
    """The compute capabilities to compile for, sorted. Raises TargetError for one that the builder cannot compile for."""
    wanted = tuple(sorted(dict.fromkeys(sm)))
    device, _ = target.gpu()
    if target.backend == "tensorrt-rtx":
        refused = [one for one in wanted if one not in AHEAD_OF_TIME_SM]
        if refused:
            raise TargetError(
                f"TensorRT-RTX compiles for SM {_listed(AHEAD_OF_TIME_SM)}, not for SM {_listed(refused)}: choose a target of "
                "backend tensorrt for that GPU (h100-h200 for SM 90, jetson-* for SM 87 and 110); `vlm-edge targets` lists them."
            )
    elif unknown := [one for one in wanted if one not in device.sm]:
        raise TargetError(
            f"{target.name} is for SM {_listed(device.sm)}, not for SM {_listed(unknown)}: TensorRT compiles for the GPU of the "
            "machine it runs on; choose that GPU's target (`vlm-edge targets` lists them)."
        )
    if not wanted:
        raise TargetError(f"{target.name}: no compute capability to compile for; name one, for example {device.sm[0]}.")
    return wanted


def load_library(target: Target, sm: Sequence[int], *, gpu: Gpu | None) -> Library:
    """The TensorRT that compiles a target's engines on this machine. `gpu` is what `local_gpu` found.

    Raises NotHere where they are compiled on another machine (a Jetson's, by its own TensorRT), TargetError where they would be
    compiled here and cannot: not installed, or a version that the target does not allow.
    """
    flavour: Flavour = "tensorrt-rtx" if target.backend == "tensorrt-rtx" else "tensorrt"
    device, _ = target.gpu()
    if flavour == "tensorrt" and (gpu is None or gpu.sm not in sm):
        there = f"a {gpu.name} (SM {gpu.sm})" if gpu is not None else "no GPU"
        raise NotHere(
            f"TensorRT compiles for the GPU of the machine it runs on, and this one has {there}; copy the bundle to the device "
            f"(SM {_listed(sm)}{_jetpack(target)}) and run the same command there"
        )
    library = _imported(target, flavour)
    if not device.accepts(library.version):
        raise TargetError(
            f"{target.name} is for {flavour} {device.tensorrt}{_jetpack(target)}, installed is {library.version}: install a "
            "version in that range, or build for the target of the version that is here (`vlm-edge targets` lists them)."
        )
    return library


def _imported(target: Target, flavour: Flavour) -> Library:
    name = _MODULES[flavour]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise TargetError(_missing(target, flavour)) from None
    except (ImportError, OSError) as error:  # its libraries do not load
        raise TargetError(f"{name} is installed and does not load ({error}): {_remedy(target, flavour)}") from error
    return Library(module, flavour, str(module.__version__))


def _missing(target: Target, flavour: Flavour) -> str:
    return f"{target.name} is compiled by {flavour}, which is not installed here: {_remedy(target, flavour)}"


def _remedy(target: Target, flavour: Flavour) -> str:
    device, _ = target.gpu()
    if flavour == "tensorrt-rtx":
        return f"pip install 'vlm-edge[tensorrt-rtx]' (tensorrt-rtx {device.tensorrt}); --no-engines makes the graphs alone."
    if device.jetpack:
        return (
            f"it comes with JetPack {device.jetpack} (sudo apt install python3-libnvinfer), for the system's Python; a virtual "
            "environment sees it when it was made with --system-site-packages."
        )
    return f"install NVIDIA's tensorrt {device.tensorrt} for this CUDA; --no-engines makes the graphs alone."


def _jetpack(target: Target) -> str:
    device, _ = target.gpu()
    return f", JetPack {device.jetpack}" if device.jetpack else ""


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def create_network(library: Library, builder: Any) -> Any:
    """An empty, strongly typed network."""
    flag = getattr(library.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if flag is None else 1 << int(flag))


def set_targets(library: Library, config: Any, sm: Sequence[int]) -> None:
    """Names the compute capabilities to compile for; TensorRT itself takes the GPU that is there. Raises TargetError for one

    that the library refuses.
    """
    if not library.ahead_of_time:
        return
    known = library.module.ComputeCapability
    config.num_compute_capabilities = len(sm)
    for index, one in enumerate(sm):
        capability = getattr(known, f"SM{one}", None)
        if capability is None or not config.set_compute_capability(capability, index):
            raise TargetError(f"tensorrt-rtx {library.version} does not compile for SM {one}; leave it out.")


def allow_decomposition(library: Library, layer: Any) -> bool:
    """Lets TensorRT take a parsed attention apart where it has no fused kernel for it. False: the layer is no attention.

    The parser hands out plain layers; the class says what one is (IAttentionInputLayer.attention, TensorRT 10.14 and newer).
    """
    kinds = library.module.LayerType
    if not hasattr(kinds, "ATTENTION_INPUT") or layer.type != kinds.ATTENTION_INPUT:
        return False
    layer.__class__ = library.module.IAttentionInputLayer
    layer.attention.decomposable = True
    return True


def keep_capturable(library: Library, config: Any) -> None:
    """Keeps TensorRT-RTX from allocating memory while an engine runs, so that the runtime may capture it in a CUDA graph.

    TensorRT's engines of fixed sizes are capturable as they are (BuilderFlag.REQUIRE_USER_ALLOCATION, TensorRT-RTX 1.2).
    """
    flag = getattr(library.module.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if library.ahead_of_time and flag is not None:
        config.set_flag(flag)


def keep_float32(library: Library, config: Any) -> None:
    """Products of float32 are computed in float32: a build says what precision it has (TF32, 10 bits of it, is on by default)."""
    config.clear_flag(library.module.BuilderFlag.TF32)


def set_workspace(library: Library, config: Any, limit: int | None) -> None:
    """Caps the scratch memory that kernels may ask for, in bytes (None: all there is)."""
    if limit is not None:
        config.set_memory_pool_limit(library.module.MemoryPoolType.WORKSPACE, limit)


def has_timing_cache(library: Library) -> bool:
    """Whether timings of kernels can be kept between builds."""
    return not library.ahead_of_time


def set_timings(library: Library, config: Any, data: bytes) -> None:
    """Gives the builder the timings of an earlier build on this very GPU (empty bytes: a new cache)."""
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def timings(config: Any) -> bytes:
    """The timings that a finished build measured, to be kept."""
    cache = config.get_timing_cache()
    return bytes(cache.serialize()) if cache is not None else b""
