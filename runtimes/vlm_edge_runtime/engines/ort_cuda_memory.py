"""Memory that a decoder's cache lives in: on the GPU through cuda-bindings, or on the host, where the same loop is tested."""

from __future__ import annotations

import ctypes
import importlib
import threading
from typing import Any, Protocol

import numpy as np

from vlm_edge_runtime.errors import DeviceError

from .base import Array
from .cuda_driver import INSTALL

ALIGNMENT = 256
"""What cudaMalloc aligns to; pieces of one allocation begin at multiples of it."""


def aligned(size: int) -> int:
    """`size` bytes rounded up to a multiple of ALIGNMENT."""
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


class Memory(Protocol):
    """Memory of one device, addressed by integers. Everything is ordered on one stream; `download` waits for it."""

    device: str
    """ONNX Runtime's name of the device: "cuda" or "cpu"."""
    stream: int
    """Address of the CUDA stream; 0 where there is none."""

    def allocate(self, size: int) -> int:
        """Address of `size` zeroed bytes. Raises DeviceError when they cannot be had."""

    def free(self, address: int) -> None:
        """Frees what `allocate` gave. Does not raise."""

    def upload(self, address: int, array: Array) -> None:
        """Copies a contiguous host array to `address`; the array may be changed afterwards."""

    def download(self, address: int, array: Array) -> None:
        """Fills a contiguous host array from `address`, after everything before it."""

    def copy_lines(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, lines: int) -> None:
        """Copies `lines` pieces of `width` bytes, which lie the pitches apart. The areas must not overlap."""


class HostMemory:
    """The host's memory behind the same calls (ONNX Runtime's CPU provider)."""

    device = "cpu"
    stream = 0

    def __init__(self) -> None:
        self._blocks: dict[int, Array] = {}
        self._lock = threading.Lock()

    def allocate(self, size: int) -> int:
        """Address of `size` zeroed bytes."""
        try:
            block = np.zeros(size + ALIGNMENT, np.uint8)
        except MemoryError:
            raise DeviceError(f"no memory for {size} bytes: use a smaller context length or batch") from None
        address = aligned(block.ctypes.data)
        with self._lock:
            self._blocks[address] = block
        return address

    def free(self, address: int) -> None:
        """Frees what `allocate` gave."""
        with self._lock:
            self._blocks.pop(address, None)

    def upload(self, address: int, array: Array) -> None:
        """Copies a contiguous array to `address`."""
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, address: int, array: Array) -> None:
        """Fills a contiguous array from `address`."""
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def copy_lines(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, lines: int) -> None:
        """Copies `lines` pieces of `width` bytes."""
        for line in range(lines):
            ctypes.memmove(to + line * to_pitch, source + line * source_pitch, width)


class CudaMemory:
    """The memory of GPU 0 (of CUDA_VISIBLE_DEVICES), and the one stream that all graphs of the process run on.

    Host arrays are ordinary, not page-locked memory: an upload has left them when the call returns (CUDA Runtime API, "API
    synchronization behavior"). Raises DeviceError for every CUDA error.
    """

    device = "cuda"

    def __init__(self) -> None:
        self._cuda = runtime_api()
        self._kinds = self._cuda.cudaMemcpyKind
        self.stream = int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))

    def allocate(self, size: int) -> int:
        """Address of `size` zeroed bytes on the GPU."""
        error, address = self._cuda.cudaMalloc(max(size, 1))
        if int(error) != 0:
            self._cuda.cudaGetLastError()  # so that the next call does not report this failure again
            free, total = self._call("cudaMemGetInfo")
            raise DeviceError(
                f"the GPU has no room for {size >> 20} MiB more ({free >> 20} of {total >> 20} MiB are free): use a smaller "
                "context length or batch, or a build with smaller weights"
            )
        self._call("cudaMemsetAsync", address, 0, max(size, 1), self.stream)
        return int(address)

    def free(self, address: int) -> None:
        """Frees what `allocate` gave, after everything that uses it."""
        self._cuda.cudaStreamSynchronize(self.stream)
        self._cuda.cudaFree(address)

    def upload(self, address: int, array: Array) -> None:
        """Copies a contiguous host array to `address`."""
        kind = self._kinds.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)

    def download(self, address: int, array: Array) -> None:
        """Fills a contiguous host array from `address`."""
        kind = self._kinds.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)
        self._call("cudaStreamSynchronize", self.stream)

    def copy_lines(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, lines: int) -> None:
        """Copies `lines` pieces of `width` bytes on the GPU."""
        if width and lines:
            kind = self._kinds.cudaMemcpyDeviceToDevice
            self._call("cudaMemcpy2DAsync", to, to_pitch, source, source_pitch, width, lines, kind, self.stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        return checked(self._cuda, name, *arguments)


def runtime_api() -> Any:
    """The module `cuda.bindings.runtime`. Raises DeviceError saying how to install it."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise DeviceError(f"cuda-bindings, through which the GPU is reached, cannot be imported ({error}). {INSTALL}") from None


def checked(cuda: Any, name: str, *arguments: Any) -> Any:
    """Calls a function of the CUDA runtime: what it gives, without the error code. Raises DeviceError naming the function."""
    error, *results = getattr(cuda, name)(*arguments)
    if int(error) != 0:
        _, said = cuda.cudaGetErrorString(error)
        raise DeviceError(f"CUDA's {name} failed: {said.decode() if isinstance(said, bytes) else said} (error {int(error)})")
    return results[0] if len(results) == 1 else tuple(results)
