"""Stand-ins for a GPU and for TensorRT, for tests on machines without either: device memory is this process's, compiled graphs
are ONNX Runtime sessions on the CPU, the decode kernels are compiled as C++, and the C loop talks to a stand-in of the CUDA
driver's library.

Nothing is done when it is queued: work waits until somebody synchronises, as on a GPU, so that what is read too early is wrong
here too.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from host_kernels import HostKernels, compile_shared

from vlm_edge_runtime.engines.cuda_device import ALIGNMENT
from vlm_edge_runtime.engines.tensorrt_program import Profile, Shape, TensorInfo
from vlm_edge_runtime.errors import DeviceError

Work = Callable[[], None]

STAND_IN_LIBCUDA = """
typedef int (*Call)(unsigned long long);
static Call launch, record, wait_for;
void stand_in(Call l, Call r, Call w) { launch = l; record = r; wait_for = w; }
int cuGraphLaunch(void *graph, void *stream) { (void)stream; return launch((unsigned long long)graph); }
int cuEventRecord(void *event, void *stream) { (void)stream; return record((unsigned long long)event); }
int cuEventSynchronize(void *event) { return wait_for((unsigned long long)event); }
int cuGetErrorName(int error, const char **name) {
    static const char *names[] = {"CUDA_SUCCESS", "CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_OUT_OF_MEMORY"};
    *name = error >= 0 && error < 3 ? names[error] : "CUDA_ERROR_LAUNCH_FAILED";
    return 0;
}
"""
_Call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_ulonglong)


class StandInLibcuda:
    """The compiled stand-in. Handles are numbers that these tables know; a call that fails gives 719 (launch failed)."""

    def __init__(self, folder: Path) -> None:
        self.path = str(compile_shared(STAND_IN_LIBCUDA, "stand_in_libcuda", folder, compiler="gcc"))
        self.launches: dict[int, Callable[[], None]] = {}
        self.records: dict[int, Callable[[], None]] = {}
        self.waits: dict[int, Callable[[], None]] = {}
        self.errors: list[BaseException] = []
        self._calls = [_Call(self._caller(table)) for table in (self.launches, self.records, self.waits)]
        ctypes.CDLL(self.path).stand_in(*self._calls)

    def _caller(self, table: Mapping[int, Callable[[], None]]) -> Callable[[int], int]:
        def call(handle: int) -> int:
            try:
                table[handle]()
            except BaseException as error:
                self.errors.append(error)
                return 719
            return 0

        return call


class HostMemory:
    """Device memory: a piece of this process's, aligned, filled with what stands for garbage."""

    def __init__(self, device: HostDevice, nbytes: int) -> None:
        self._device = device
        self._raw = np.full(nbytes + ALIGNMENT, 0xFF, np.uint8)  # NaN in every float type
        start = self._raw.ctypes.data
        self.address = start + -start % ALIGNMENT
        self.nbytes = nbytes
        device.live[id(self)] = nbytes

    def close(self) -> None:
        if self._device.live.pop(id(self), None) is not None:
            assert not self._device.queue, "memory is freed while queued work may use it"
            self._raw[:] = 0xEE

    def __del__(self) -> None:  # freeing waits for the device, as cuMemFree does
        if self._device.live.pop(id(self), None) is not None:
            self._device.drain()


class HostShared:
    """`cuda_device.Shared`."""

    def __init__(self, nbytes: int) -> None:
        self.array = np.zeros(nbytes, np.uint8)
        self.address = self.array.ctypes.data

    def close(self) -> None:
        self.address = 0


class HostDevice:
    """`cuda_device.Device` without a GPU."""

    def __init__(self, kernels: HostKernels, folder: Path, *, sm: int = 86, limit: int = 1 << 40) -> None:
        self.name, self.sm, self.stream, self.driver_version = "stand-in", sm, 7, 13000
        self.kernels, self.limit = kernels, limit
        self.libcuda = StandInLibcuda(folder)
        self.library = self.libcuda.path
        self.queue: list[Work] = []
        self.live: dict[int, int] = {}
        self.captured: list[Work] | None = None
        self.events = (101, 102)
        self.counts = {"graphs": 0, "graph launches": 0, "uploads": 0, "downloads": 0}
        self._marks = dict.fromkeys(self.events, 0)
        self._done = 0
        self._handles = itertools.count(1001)
        self.closed = False
        for event in self.events:
            self.libcuda.records[event] = lambda event=event: self._mark(event)
            self.libcuda.waits[event] = lambda event=event: self._run(self._marks[event])

    def use(self) -> None:
        if self.closed:
            raise DeviceError("GPU stand-in is closed")

    def allocate(self, nbytes: int) -> HostMemory:
        if sum(self.live.values()) + nbytes > self.limit:
            raise DeviceError(f"GPU stand-in has no {nbytes / 2**20:.0f} MiB left")
        assert self.captured is None, "memory is allocated while capturing"
        return HostMemory(self, nbytes)

    def shared(self, nbytes: int) -> HostShared:
        return HostShared(nbytes)

    def upload(self, address: int, array: np.ndarray) -> None:
        assert self.captured is None, "a copy from the host is captured"
        assert array.flags.c_contiguous
        self.counts["uploads"] += 1
        data = array.tobytes()
        self.enqueue(lambda: ctypes.memmove(address, data, len(data)))

    def download(self, array: np.ndarray, address: int) -> None:
        assert array.flags.c_contiguous and array.flags.writeable
        self.counts["downloads"] += 1
        self.synchronize()
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def copy(self, to: int, origin: int, nbytes: int) -> None:
        self.enqueue(lambda: ctypes.memmove(to, origin, nbytes))

    def copy_rows(self, to: int, to_pitch: int, origin: int, pitch: int, width: int, rows: int) -> None:
        def work() -> None:
            for row in range(rows):
                ctypes.memmove(to + row * to_pitch, origin + row * pitch, width)

        assert rows <= 1 or (width <= pitch and width <= to_pitch)
        self.enqueue(work)

    def zero(self, address: int, nbytes: int) -> None:
        self.enqueue(lambda: ctypes.memset(address, 0, nbytes))

    def synchronize(self) -> None:
        assert self.captured is None, "the stream is synchronised while capturing"
        self._run(self._done + len(self.queue))

    def drain(self) -> None:
        """Finishes what is queued, whatever comes of it."""
        while self.queue:
            with contextlib.suppress(Exception):
                self._run(self._done + len(self.queue))

    def launch(self, kernel: str, step: int, grid: tuple[int, int], threads: int) -> None:
        assert threads & (threads - 1) == 0
        self.enqueue(lambda: self.kernels.launch(kernel, step, grid, 1))

    def begin_capture(self) -> None:
        self.captured = []

    def end_capture(self) -> int:
        assert self.captured is not None
        works, self.captured = self.captured, None
        handle = next(self._handles)
        self.libcuda.launches[handle] = lambda: self._replay(works)
        self.counts["graphs"] += 1
        return handle

    def launch_graph(self, graph: int) -> None:
        self.libcuda.launches[graph]()

    def free_graph(self, graph: int) -> None:
        del self.libcuda.launches[graph]

    def free_memory(self) -> int:
        return self.limit - sum(self.live.values())

    def close(self) -> None:
        self.closed = True

    def enqueue(self, work: Work) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def _replay(self, works: Sequence[Work]) -> None:
        self.counts["graph launches"] += 1
        self.queue.extend(works)

    def _mark(self, event: int) -> None:
        self._marks[event] = self._done + len(self.queue)

    def _run(self, until: int) -> None:
        while self._done < until:
            self._done += 1
            try:
                self.queue.pop(0)()
            except BaseException:  # what follows a failed run is not done
                self._done += len(self.queue)
                self.queue.clear()
                raise


class PromptDevice(HostDevice):
    """Work is done when it is queued: what ONNX Runtime's CPU provider runs between kernels, it runs at once too."""

    def enqueue(self, work: Work) -> None:
        if self.captured is None:
            work()
        else:
            self.captured.append(work)

    def _replay(self, works: Sequence[Work]) -> None:
        self.counts["graph launches"] += 1
        for work in works:
            work()


@dataclass(slots=True)
class Call:
    """What one run was queued with."""

    shapes: dict[str, Shape]
    addresses: dict[str, int]


class HostProgram:
    """`tensorrt_program.Program` that runs a lowered graph in ONNX Runtime on the CPU."""

    def __init__(
        self, model: bytes | str, device: HostDevice, profiles: Sequence[Profile] = (), *, captures: bool = True
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.device, self.profiles, self.captures = device, profiles, captures
        self.tensors = {
            value.name: TensorInfo(
                value.name, _TYPES[value.type], tuple(s if isinstance(s, int) else -1 for s in value.shape), given
            )
            for given, values in ((True, self.session.get_inputs()), (False, self.session.get_outputs()))
            for value in values
        }
        self.in_place = False
        self.contexts: list[tuple[int, bool]] = []
        self.closed = False

    def alias(self, output: str) -> str | None:
        past = output.replace("present.", "past_key_values.")
        return past if self.in_place and output.startswith("present.") and past in self.tensors else None

    def context(self, profile: int, *, fixed: bool) -> HostContext:
        self.contexts.append((profile, fixed))
        return HostContext(self, profile)

    def close(self) -> None:
        self.closed = True


class HostContext:
    """`tensorrt_program.Context` for a HostProgram."""

    def __init__(self, program: HostProgram, profile: int) -> None:
        self._program = program
        self._profile = profile
        self._call = Call({}, {})

    def set_shape(self, name: str, shape: Shape) -> None:
        info = self._program.tensors[name]
        assert info.is_input and len(shape) == len(info.shape), name
        assert all(size >= 1 for size in shape), (name, shape)
        if self._program.profiles and (misfit := self._program.profiles[self._profile].misfit({name: shape})):
            raise DeviceError(misfit)
        self._call.shapes[name] = tuple(shape)

    def set_address(self, name: str, address: int) -> None:
        assert address % ALIGNMENT == 0, f"{name} is not aligned"
        assert name in self._program.tensors
        self._call.addresses[name] = address

    def output_shape(self, name: str) -> Shape:
        """By the names of dimensions, as they are in the graph."""
        sizes: dict[str, int] = {}
        for value in self._program.session.get_inputs():
            sizes |= {
                dim: size for dim, size in zip(value.shape, self._call.shapes[value.name], strict=True) if isinstance(dim, str)
            }
        (value,) = [one for one in self._program.session.get_outputs() if one.name == name]
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in value.shape)

    def enqueue(self, stream: int) -> None:
        program = self._program
        assert stream == program.device.stream
        assert not program.closed
        call = Call(dict(self._call.shapes), dict(self._call.addresses))
        missing = program.tensors.keys() - call.addresses.keys()
        assert not missing, missing
        for info in program.tensors.values():
            if info.is_input and -1 not in info.shape:
                call.shapes.setdefault(info.name, info.shape)

        def work() -> None:
            feeds = {
                name: view(call.addresses[name], call.shapes[name], info.dtype).copy()
                for name, info in program.tensors.items()
                if info.is_input
            }
            names = [info.name for info in program.tensors.values() if not info.is_input]
            try:
                results = program.session.run(names, feeds)
            except Exception as error:  # ONNX Runtime's own classes
                raise DeviceError(str(error)) from error
            for name, array in zip(names, results, strict=True):
                data = np.ascontiguousarray(array)
                assert data.dtype == program.tensors[name].dtype
                ctypes.memmove(call.addresses[name], data.ctypes.data, data.nbytes)

        program.device.enqueue(work)

    def capturable(self, stream: int) -> bool:
        return self._program.captures

    def frozen(self) -> list:
        return []

    def set_total(self, entries: int) -> None:
        assert entries >= 1

    def close(self) -> None:
        pass


def view(address: int, shape: Sequence[int], dtype: str) -> np.ndarray:
    """An array over memory at an address."""
    count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * count).from_address(address), dtype=dtype).reshape(tuple(shape))


_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
