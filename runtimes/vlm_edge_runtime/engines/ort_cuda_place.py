"""Where the graphs of the CUDA engine run: ONNX Runtime's CUDA provider, or one clear reason why it cannot be had here."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import re
import sys
import threading
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from vlm_edge_runtime import _native
from vlm_edge_runtime.errors import DeviceError

from .cuda_device import CudaDevice, Device
from .cuda_driver import open_driver
from .ort_cuda_models import cast
from .ort_library import check_version, ensure_runtime, find_library, version_tuple

WHEEL = "onnxruntime-gpu"
MOST_CAPTURES = 64
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_PROVIDER_LIBRARY = "libonnxruntime_providers_cuda.so"
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
    """A provider of ONNX Runtime with the device that its memory is of. `lock`: one piece of work at a time, since nothing else

    may use the GPU while a CUDA graph is captured (cudaStreamCaptureModeGlobal). `cuda`: options of the CUDA provider, None for
    the CPU's. `cuda_graphs`: whether steps of fixed shape may be captured.
    """

    device: Device
    cuda: dict[str, str] | None = None
    cuda_graphs: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)
    spent: str = ""
    """Why no more CUDA graphs are made; empty as long as they are."""
    captures: int = 0

    def graph_id(self) -> int:
        """A number for another CUDA graph of ONNX Runtime's, or −1: no graph.

        They live as long as the session (its CUDA provider frees none), so there is a last one.
        """
        if not self.cuda_graphs or self.captures >= MOST_CAPTURES:
            if self.cuda_graphs:
                self.spent = f"{MOST_CAPTURES} CUDA graphs were captured for decoder states, and ONNX Runtime frees none of them"
            return -1
        self.captures += 1
        return self.captures

    @property
    def provider(self) -> str:
        """ONNX Runtime's name of it."""
        return _CPU if self.cuda is None else _CUDA

    def session(self, model: str | bytes, role: str, *, captured: bool = False) -> tuple[_native.Session, str | None]:
        """(a session, why its runs cannot be captured or None). All of it runs on the provider.

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

    def _open(self, model: str | bytes, role: str, extra: dict[str, str]) -> _native.Session:
        config = {_RECORD: "1"}
        if self.cuda is not None and version_tuple(ensure_runtime()) < (1, 24):  # all or nothing, shape arithmetic too
            config = {_NO_FALLBACK: "1"}
        options = None if self.cuda is None else {**self.cuda, **extra}
        with self.lock:
            self.device.use()
            try:  # one thread: what stays on the CPU beside a GPU is arithmetic on shapes
                session = _native.Session(model, role, config, threads=1, spin=False, cuda=options)
            except DeviceError as error:
                text = _one_line(error).removeprefix(f"graph '{role}': ")
                raise DeviceError(f"graph '{role}' cannot be loaded by {self.provider}: {text}") from None
        placed = _native.session_placement(session)
        if placed is not None:
            check_placement(role, self.provider, placed)
        return session


def host_place(device: Device, *, cuda_graphs: bool = False) -> Place:
    """The CPU provider behind the same loop, over a stand-in for the device: a machine without a GPU runs the rest for real."""
    ensure_runtime()
    return Place(device, cuda_graphs=cuda_graphs)


_gpu_lock = threading.RLock()
"""Of all engines in the process: a capture of one forbids what another would do."""


def cuda_place(cuda_graphs: bool = True, *, spin: bool = True) -> Place:
    """The CUDA provider on GPU 0 of this process, checked from the wheel to the device. Raises DeviceError with the first

    thing that is missing. fp32 products are computed in fp32, not TF32: a build says what precision it has.
    """
    check_wheel()
    check_device()
    device = CudaDevice(spin=spin)
    try:
        options = {
            "device_id": "0",
            "user_compute_stream": str(device.stream),
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",
            "use_tf32": "0",
        }
        place = Place(device, options, cuda_graphs, _gpu_lock)
        check_provider(place)
        return place
    except BaseException:
        device.close()
        raise


def check_wheel() -> None:
    """Raises DeviceError unless the ONNX Runtime that Python finds is one with the CUDA provider, and new enough.

    Nothing of it is imported: the C API's library is used, and two copies of ONNX Runtime with one CUDA provider would clash.
    """
    try:
        library = find_library()
    except DeviceError as error:
        raise DeviceError(
            f'device="cuda" needs ONNX Runtime with CUDA, which is not here ({_one_line(error)}): pip install {WHEEL}'
        ) from None
    if (library.parent / _PROVIDER_LIBRARY).is_file() or list(library.parent.glob("*providers_cuda*")):
        check_version(ensure_runtime())
        return
    both = all(_installed(name) for name in ("onnxruntime", WHEEL))
    what = (
        f"onnxruntime and {WHEEL} are both installed and overwrite each other's files"
        if both
        else f"the installed onnxruntime {ensure_runtime()} is the CPU wheel"
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


def check_provider(place: Place) -> None:
    """Opens a graph of one node with the provider. Raises DeviceError with what ONNX Runtime says, and how to mend it.

    The provider's library is left to ONNX Runtime: it reaches back into whoever loads it, and ends a process that loads it alone.
    """
    try:
        place.session(cast(1, "float32", "float16"), "first_graph")[0].close()
    except DeviceError as error:
        text = _one_line(error)
        if "Failed to load library" not in text:
            raise
        raise DeviceError(
            f"the CUDA provider of {WHEEL} cannot be loaded: {text.rpartition('with error: ')[2]}. Install CUDA's libraries "
            f"beside it: pip install '{WHEEL}[cuda,cudnn]'."
        ) from None


def wheel_cuda_version() -> tuple[int, int] | None:
    """(major, minor) of the CUDA that the installed wheel was built with; None where it does not say."""
    found = find_library().parent / "build_and_package_info.py"
    match = re.search(r"^cuda_version\s*=\s*['\"](\d+)(?:\.(\d+))?", found.read_text(), re.MULTILINE) if found.is_file() else None
    return (int(match[1]), int(match[2] or 0)) if match else None


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
