"""One GPU through CUDA's driver API: memory, copies, one stream, captured graphs, the decode kernels.

`Device` is all that the TensorRT engine asks of a GPU. Everything runs in order on one stream of the device's primary context,
which TensorRT shares; `use` makes it current in the calling thread and comes before anything else there.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.errors import DeviceError

from .base import Array
from .cuda_driver import checked, compute_capability, driver, open_driver
from .cuda_kernels import compiled_kernels
from .cuda_layout import KERNELS

ALIGNMENT = 256
"""Bytes that tensor addresses are multiples of, which is what `cuMemAlloc` gives and TensorRT expects."""


class Memory(Protocol):
    """A piece of device memory."""

    address: int
    nbytes: int

    def close(self) -> None:
        """Frees it. The stream must be done with it."""


class Shared(Protocol):
    """Page-locked host memory that kernels write: `array` uint8 here, `address` there."""

    array: npt.NDArray[np.uint8]
    address: int

    def close(self) -> None:
        """Frees it; nothing may look at `array` any more."""


class Device(Protocol):
    """A GPU. Addresses are integers; copies and kernels are queued on `stream` (an integer handle) in the order of the calls."""

    name: str
    sm: int
    stream: int
    driver_version: int
    library: str
    events: tuple[int, int]

    def use(self) -> None: ...
    def allocate(self, nbytes: int) -> Memory:
        """Uninitialised memory, aligned to ALIGNMENT. Raises DeviceError when it cannot be had."""

    def shared(self, nbytes: int) -> Shared: ...
    def upload(self, address: int, array: Array) -> None:
        """Copies a C-contiguous array, which may be changed as soon as this returns."""

    def download(self, array: Array, address: int) -> None:
        """Fills a C-contiguous array; waits for everything that was queued before."""

    def copy(self, to: int, origin: int, nbytes: int) -> None: ...
    def copy_rows(self, to: int, to_pitch: int, origin: int, pitch: int, width: int, rows: int) -> None:
        """`rows` pieces of `width` bytes that lie `pitch` bytes apart."""

    def zero(self, address: int, nbytes: int) -> None: ...
    def synchronize(self) -> None:
        """Waits for the stream. Raises DeviceError for a fault of anything that was queued."""

    def launch(self, kernel: str, step: int, grid: tuple[int, int], threads: int) -> None:
        """Queues one of `cuda_layout.KERNELS` with the address of its Step."""

    def begin_capture(self) -> None:
        """What this thread queues from now on is recorded instead of run."""

    def end_capture(self) -> int:
        """A handle of what was recorded. Raises DeviceError when it cannot be captured; then nothing was run either."""

    def launch_graph(self, graph: int) -> None: ...
    def free_graph(self, graph: int) -> None: ...
    def free_memory(self) -> int:
        """Bytes that can be allocated now."""

    def close(self) -> None: ...


class CudaMemory:
    """Device memory from `cuMemAlloc`."""

    def __init__(self, device: CudaDevice, nbytes: int) -> None:
        self._device = device
        self.nbytes = nbytes
        self.address = device.raw_allocate(max(nbytes, 1))

    def close(self) -> None:
        """Frees it."""
        address, self.address = self.address, 0
        if address:
            self._device.raw_free(address)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()


class CudaShared:
    """Page-locked memory from `cuMemHostAlloc`, zeroed."""

    def __init__(self, device: CudaDevice, nbytes: int) -> None:
        self._device = device
        self._pointer, self.address = device.raw_shared(nbytes)
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self._pointer))
        self.array[:] = 0

    def close(self) -> None:
        """Frees it."""
        pointer, self._pointer = self._pointer, 0
        if pointer:
            self._device.raw_free_shared(pointer)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()


class CudaDevice:
    """GPU `ordinal`. Raises DeviceError: no driver, no GPU, a driver too old, no compiler for the kernels.

    `spin`: `decode` waits for each step actively (lower latency), else asleep.
    """

    def __init__(self, ordinal: int = 0, *, spin: bool = True) -> None:
        api = driver()
        self.driver_version = open_driver()
        count = int(checked("cuDeviceGetCount", api.cuDeviceGetCount()))
        if ordinal >= count:
            raise DeviceError(
                f"GPU {ordinal} was asked for, this machine has {count}: see `nvidia-smi`, or CUDA_VISIBLE_DEVICES."
            )
        device = checked("cuDeviceGet", api.cuDeviceGet(ordinal))
        raw_name = checked("cuDeviceGetName", api.cuDeviceGetName(256, device))
        self.name = raw_name.split(b"\0")[0].decode("utf-8", "replace")
        self.sm = compute_capability(api, device)
        self.library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        self._api = api
        self._device = device
        self._context: Any = checked("cuDevicePrimaryCtxRetain", api.cuDevicePrimaryCtxRetain(device))
        self.use()
        self._stream = checked("cuStreamCreate", api.cuStreamCreate(api.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.stream = int(self._stream)
        flags = api.CUevent_flags.CU_EVENT_DISABLE_TIMING | (0 if spin else api.CUevent_flags.CU_EVENT_BLOCKING_SYNC)
        self._events = [checked("cuEventCreate", api.cuEventCreate(int(flags))) for _ in range(2)]
        self.events = (int(self._events[0]), int(self._events[1]))
        self._module = checked("cuModuleLoadData", api.cuModuleLoadData(compiled_kernels(self.sm)))
        self._kernels = {
            name: checked("cuModuleGetFunction", api.cuModuleGetFunction(self._module, name.encode())) for name in KERNELS
        }

    def use(self) -> None:
        """Makes the context current in this thread."""
        if self._context is None:
            raise DeviceError(f"GPU {self.name} is closed")
        checked("cuCtxSetCurrent", self._api.cuCtxSetCurrent(self._context))

    def allocate(self, nbytes: int) -> CudaMemory:
        """Uninitialised memory."""
        return CudaMemory(self, nbytes)

    def raw_allocate(self, nbytes: int) -> int:
        """An address from `cuMemAlloc`. Raises DeviceError when the memory cannot be had."""
        result = self._api.cuMemAlloc(nbytes)
        if result[0] == self._api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise DeviceError(
                f"GPU {self.name} has no {nbytes / 2**20:.0f} MiB left ({self.free_memory() / 2**20:.0f} MiB are free): use a "
                "smaller context length or batch, or close what else runs on it."
            )
        return int(checked("cuMemAlloc", result))

    def raw_free(self, address: int) -> None:
        """Frees what `raw_allocate` gave; nothing after `close`, which has freed all."""
        if self._context is not None:
            self.use()
            self._api.cuMemFree(address)

    def shared(self, nbytes: int) -> CudaShared:
        """Page-locked host memory, mapped into the device's address space."""
        return CudaShared(self, nbytes)

    def raw_shared(self, nbytes: int) -> tuple[int, int]:
        """The host's and the device's address of new page-locked memory."""
        pointer = int(checked("cuMemHostAlloc", self._api.cuMemHostAlloc(nbytes, self._api.CU_MEMHOSTALLOC_DEVICEMAP)))
        address = int(checked("cuMemHostGetDevicePointer", self._api.cuMemHostGetDevicePointer(pointer, 0)))
        return pointer, address

    def raw_free_shared(self, pointer: int) -> None:
        """Frees what `raw_shared` gave."""
        if self._context is not None:
            self.use()
            self._api.cuMemFreeHost(pointer)

    def upload(self, address: int, array: Array) -> None:
        """Host to device. Of pageable memory, which arrays are, the driver has taken a copy when it returns."""
        assert array.flags.c_contiguous
        if array.nbytes:
            checked("cuMemcpyHtoD", self._api.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, self._stream))

    def download(self, array: Array, address: int) -> None:
        """Device to host."""
        assert array.flags.c_contiguous and array.flags.writeable
        if array.nbytes:
            checked("cuMemcpyDtoH", self._api.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, self._stream))
        self.synchronize()

    def copy(self, to: int, origin: int, nbytes: int) -> None:
        """Device to device."""
        if nbytes:
            checked("cuMemcpyDtoD", self._api.cuMemcpyDtoDAsync(to, origin, nbytes, self._stream))

    def copy_rows(self, to: int, to_pitch: int, origin: int, pitch: int, width: int, rows: int) -> None:
        """Device to device, in pieces."""
        if width == 0 or rows == 0:
            return
        plan = self._api.CUDA_MEMCPY2D()
        plan.srcMemoryType = plan.dstMemoryType = self._api.CUmemorytype.CU_MEMORYTYPE_DEVICE
        plan.srcDevice, plan.srcPitch = origin, pitch
        plan.dstDevice, plan.dstPitch = to, to_pitch
        plan.WidthInBytes, plan.Height = width, rows
        checked("cuMemcpy2D", self._api.cuMemcpy2DAsync(plan, self._stream))

    def zero(self, address: int, nbytes: int) -> None:
        """Sets bytes to 0."""
        if nbytes:
            checked("cuMemsetD8", self._api.cuMemsetD8Async(address, 0, nbytes, self._stream))

    def synchronize(self) -> None:
        """Waits for the stream."""
        checked("cuStreamSynchronize", self._api.cuStreamSynchronize(self._stream))

    def launch(self, kernel: str, step: int, grid: tuple[int, int], threads: int) -> None:
        """Queues a kernel."""
        arguments = ((step,), (ctypes.c_void_p,))
        function = self._kernels[kernel]
        checked(kernel, self._api.cuLaunchKernel(function, grid[0], grid[1], 1, threads, 1, 1, 0, self._stream, arguments, 0))

    def begin_capture(self) -> None:
        """Records instead of running."""
        mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        checked("cuStreamBeginCapture", self._api.cuStreamBeginCapture(self._stream, mode))

    def end_capture(self) -> int:
        """The recorded graph, ready to be launched."""
        graph = checked("cuStreamEndCapture", self._api.cuStreamEndCapture(self._stream))
        try:
            executable = checked("cuGraphInstantiate", self._api.cuGraphInstantiate(graph, 0))
            return int(executable)
        finally:
            self._api.cuGraphDestroy(graph)

    def launch_graph(self, graph: int) -> None:
        """Queues a captured graph."""
        checked("cuGraphLaunch", self._api.cuGraphLaunch(self._api.CUgraphExec(graph), self._stream))

    def free_graph(self, graph: int) -> None:
        """Frees a captured graph."""
        if self._context is not None:
            self._api.cuGraphExecDestroy(self._api.CUgraphExec(graph))

    def free_memory(self) -> int:
        """Bytes that are free."""
        result = self._api.cuMemGetInfo()
        checked("cuMemGetInfo", result)
        return int(result[1])

    def close(self) -> None:
        """Frees the stream and releases the context."""
        if self._context is None:
            return
        self.use()
        self._api.cuStreamSynchronize(self._stream)
        for event in self._events:
            self._api.cuEventDestroy(event)
        self._api.cuModuleUnload(self._module)
        self._api.cuStreamDestroy(self._stream)
        self._context = None
        self._api.cuDevicePrimaryCtxRelease(self._device)
