"""Where the graphs of the CUDA engine run: ONNX Runtime's CUDA provider, or one clear reason why it cannot be had here."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import sys
import threading
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from vlm_edge_runtime.errors import DeviceError

from .cuda_driver import open_driver
from .ort_cuda_memory import CudaMemory, HostMemory, Memory
from .ort_library import check_version

WHEEL = "onnxruntime-gpu"
_SWAP = f"pip uninstall onnxruntime {WHEEL}, then pip install {WHEEL}"
_CUDA_LIBRARIES = ("cudart", "nvJitLink", "nvrtc", "cublasLt", "cublas", "curand", "cufft")
"""What the provider and cuDNN are linked with."""
_RECORD, _NO_FALLBACK = "session.record_ep_graph_assignment_info", "session.disable_cpu_ep_fallback"
_SHAPE_ARITHMETIC = frozenset(
    {
        "Add",
        "Cast",
        "Ceil",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Div",
        "Equal",
        "Expand",
        "Floor",
        "Gather",
        "GatherElements",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "Less",
        "LessOrEqual",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Range",
        "ReduceProd",
        "Reshape",
        "ScatterElements",
        "ScatterND",
        "Shape",
        "Size",
        "Slice",
        "Split",
        "Squeeze",
        "Sub",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)
"""What ONNX Runtime itself puts on the CPU beside a CUDA graph: arithmetic on shapes, a few numbers each."""


@dataclass(slots=True)
class Place:
    """A provider of ONNX Runtime with its memory. `lock`: one piece of work at a time, since nothing else may use the GPU

    while a CUDA graph is captured (cudaStreamCaptureModeGlobal). `cuda_graphs`: whether steps of fixed shape may be captured.
    """

    provider: str
    memory: Memory
    options: dict[str, str] = field(default_factory=dict)
    cuda_graphs: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)

    def session(self, model: str | bytes, role: str, *, captured: bool = False) -> tuple[Any, str | None]:
        """(`onnxruntime.InferenceSession`, why its runs cannot be captured or None). All of it runs on the provider.

        `captured`: its runs of fixed shape are to be CUDA graphs; other runs have to say `gpu_graph_id` −1. A graph that does
        not qualify is loaded without. Raises DeviceError, naming the graph, when it cannot run here as a whole.
        """
        if not (captured and self.cuda_graphs):
            return self._open(model, role, {}), "not asked for"
        try:
            return self._open(model, role, {"enable_cuda_graph": "1"}), None
        except DeviceError as error:
            if "graph capture" not in str(error):
                raise
            return self._open(model, role, {}), str(error)

    def _open(self, model: str | bytes, role: str, extra: dict[str, str]) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1  # what stays on the CPU beside a GPU is arithmetic on shapes
        recorded = hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info")
        if recorded:
            options.add_session_config_entry(_RECORD, "1")
        elif self.provider != "CPUExecutionProvider":  # older than 1.24: all or nothing, shape arithmetic too
            options.add_session_config_entry(_NO_FALLBACK, "1")
        try:
            with self.lock:
                providers = [(self.provider, self.options | extra)]
                session = onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
        except Exception as error:  # onnxruntime raises bare Exceptions of its own
            raise DeviceError(f"graph '{role}' cannot be loaded by {self.provider}: {_one_line(error)}") from error
        if self.provider not in session.get_providers():
            raise DeviceError(
                f"graph '{role}': ONNX Runtime left out {self.provider}: {provider_load_error() or 'it gives no reason'}"
            )
        if recorded:
            subgraphs = session.get_provider_graph_assignment_info()
            placed = [(one.ep_name, node.op_type, node.name) for one in subgraphs for node in one.get_nodes()]
            check_placement(role, self.provider, placed)
        return session


def host_place() -> Place:
    """The CPU provider behind the same loop, for its tests: a machine without a GPU runs everything but the device itself."""
    return Place("CPUExecutionProvider", HostMemory())


_cuda: Place | None = None
_cuda_lock = threading.Lock()


def cuda_place(cuda_graphs: bool = True) -> Place:
    """The CUDA provider on GPU 0 of this process, checked from the wheel to the device. Raises DeviceError with the first

    thing that is missing. fp32 products are computed in fp32, not TF32: a build says what precision it has.
    """
    global _cuda
    with _cuda_lock:
        if _cuda is None:
            check_wheel()
            check_device()
            memory = CudaMemory()
            options = {
                "device_id": "0",
                "user_compute_stream": str(memory.stream),
                "arena_extend_strategy": "kSameAsRequested",
                "cudnn_conv_algo_search": "HEURISTIC",
                "use_tf32": "0",
            }
            _cuda = Place("CUDAExecutionProvider", memory, options)
        return Place(_cuda.provider, _cuda.memory, _cuda.options, cuda_graphs, _cuda.lock)


def check_wheel() -> None:
    """Raises DeviceError unless the `onnxruntime` that Python finds is one with the CUDA provider, and new enough."""
    try:
        import onnxruntime
    except ImportError as error:
        raise DeviceError(
            f'device="cuda" needs ONNX Runtime with CUDA, which cannot be imported ({error}): pip install {WHEEL}'
        ) from None
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        check_version(onnxruntime.__version__)
        return
    both = all(_installed(name) for name in ("onnxruntime", WHEEL))
    what = (
        f"onnxruntime and {WHEEL} are both installed and overwrite each other's files"
        if both
        else f"the installed onnxruntime {onnxruntime.__version__} is the CPU wheel"
    )
    raise DeviceError(
        f'device="cuda" needs ONNX Runtime\'s CUDA provider, but {what} (the two wheels share one module name and cannot stand '
        f"side by side): {_SWAP}; it runs the cpu builds too."
    )


def check_device() -> None:
    """Raises DeviceError unless there is a GPU, a driver new enough for the wheel's CUDA, and CUDA's libraries."""
    found, needed = open_driver(), wheel_cuda_version()
    if needed and found // 1000 < needed[0]:
        raise DeviceError(
            f"the NVIDIA driver is too old: it serves CUDA {found // 1000}.{found % 1000 // 10}, {WHEEL} is built for "
            f"CUDA {needed[0]}.{needed[1]}: update the driver, or install one that is built for CUDA {found // 1000}."
        )
    _preload()
    if reason := provider_load_error():
        raise DeviceError(
            f"the CUDA provider of {WHEEL} cannot be loaded: {reason}. Install CUDA's libraries beside it: "
            f"pip install '{WHEEL}[cuda,cudnn]'."
        )


def wheel_cuda_version() -> tuple[int, int] | None:
    """(major, minor) of the CUDA that the installed wheel was built with; None where it does not say."""
    try:
        from onnxruntime.capi import build_and_package_info
    except ImportError:
        return None
    parts = str(getattr(build_and_package_info, "cuda_version", "")).split(".")
    if not parts[0].isdigit():
        return None
    return int(parts[0]), int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0


def provider_load_error() -> str | None:
    """What the dynamic loader says of the CUDA provider's library (which library is missing), or None when it loads."""
    import onnxruntime

    folder = Path(onnxruntime.__file__).parent / "capi"
    library = folder / "libonnxruntime_providers_cuda.so"
    if not library.is_file():
        return f"{library} is missing" if not list(folder.glob("*providers_cuda*")) else None  # elsewhere the names differ
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))
    except OSError as error:
        return _one_line(error)
    return None


def check_placement(role: str, provider: str, placed: list[tuple[str, str, str]]) -> None:
    """Refuses a graph that partly runs elsewhere. `placed`: (provider, operator, node's name) of every node.

    Arithmetic on shapes, which ONNX Runtime puts on the CPU on purpose, is let through. Raises DeviceError.
    """
    elsewhere = [(op, name) for where, op, name in placed if where != provider and op not in _SHAPE_ARITHMETIC]
    if elsewhere:
        op, name = elsewhere[0]
        raise DeviceError(
            f"graph '{role}': {len(elsewhere)} of {len(placed)} nodes have no kernel in {provider} and would run on the CPU, "
            f"first {op} '{name}': build the bundle for another target, or run it with device=\"cpu\"."
        )


def _preload() -> None:
    """Loads CUDA's and cuDNN's libraries from NVIDIA's wheels, wherever on Python's path those are: the provider asks for them

    by name. ONNX Runtime's own `preload_dlls` looks beside itself only. What is missing shows later.
    """
    with contextlib.suppress(ImportError):
        load = importlib.import_module("cuda.pathfinder").load_nvidia_dynamic_lib
        for name in _CUDA_LIBRARIES:
            with contextlib.suppress(Exception):  # of several classes: not found, unknown name, no such platform
                load(name)
    for folder in sys.path:
        for library in sorted(Path(folder or ".").glob("nvidia/cudnn/lib/libcudnn.so.*")):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
