"""One compiled graph run on host arrays: vision encoder, projector, text encoder and all others but the decoder."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import numpy as np

from vlm_edge_runtime.bundle.manifest import TensorSpec
from vlm_edge_runtime.errors import DeviceError

from .base import Array
from .cuda_device import Device
from .cuda_memory import Buffers
from .tensorrt_program import Context, Program
from .tensorrt_types import as_taken, size_of


class TensorRTGraph:
    """`engines.base.Graph` over a compiled graph. `inputs` and `outputs` have the portable graph's types and named dimensions."""

    def __init__(
        self,
        role: str,
        program: Program,
        device: Device,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        record: Callable[[float], None],
        lock: threading.RLock,
    ) -> None:
        self.role = role
        self.program = program
        self.inputs = tuple(spec for spec in inputs if spec.name in program.tensors)
        self.outputs = tuple(spec for spec in outputs if spec.name in program.tensors)
        self._types = {spec.name: spec.dtype for spec in self.outputs}
        self._device = device
        self._buffers = Buffers(device)
        self._contexts: dict[int, Context] = {}
        self._record = record
        self._lock = lock
        self._closed = False

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs for the named inputs. Raises DeviceError naming the graph, TypeError for inputs of another kind."""
        wanted = [info for info in self.program.tensors.values() if info.is_input]
        if feeds.keys() != {info.name for info in wanted}:
            raise DeviceError(
                f"graph '{self.role}' takes {', '.join(sorted(info.name for info in wanted))}; "
                f"given were {', '.join(sorted(feeds))}"
            )
        arrays = {info.name: as_taken(info.name, np.asarray(feeds[info.name]), info.dtype) for info in wanted}
        with self._lock:
            if self._closed:
                raise DeviceError(f"graph '{self.role}' is closed")
            self._device.use()
            begin = time.perf_counter()
            context = self._context({name: array.shape for name, array in arrays.items()})
            for name, array in arrays.items():
                context.set_shape(name, array.shape)
                context.set_address(name, self._buffers.put(name, array))
            found: dict[str, Array] = {}
            for info in self.program.tensors.values():
                if not info.is_input:
                    found[info.name] = np.empty(context.output_shape(info.name), dtype=info.dtype)
                    context.set_address(info.name, self._buffers.reserve(info.name, found[info.name].nbytes))
            context.enqueue(self._device.stream)
            for name, array in found.items():
                self._device.download(array, self._buffers.reserve(name, array.nbytes))
            self._record(time.perf_counter() - begin)
        return {name: self._as_published(name, array) for name, array in found.items()}

    def _as_published(self, name: str, array: Array) -> Array:
        return array.astype(self._types.get(name, array.dtype), copy=False)

    def _context(self, shapes: Mapping[str, tuple[int, ...]]) -> Context:
        index = fitting_profile(self.role, self.program, shapes)
        if index not in self._contexts:
            self._contexts[index] = self.program.context(index, fixed=False)
        return self._contexts[index]

    def close(self) -> None:
        """Frees the engine and its memory."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._device.use()
                self.program.close()
                self._buffers.close()


def fitting_profile(role: str, program: Program, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The first optimisation profile that takes these shapes. Raises DeviceError saying what the engine was built for."""
    for name, shape in shapes.items():
        expected = program.tensors[name].shape
        if len(expected) != len(shape) or any(size not in (-1, given) for size, given in zip(expected, shape, strict=True)):
            raise DeviceError(f"graph '{role}': '{name}' is {list(shape)}, expected {list(expected)} (-1: any size)")
    misfits = [profile.misfit(shapes) for profile in program.profiles]
    for index, misfit in enumerate(misfits):
        if misfit is None:
            return index
    if not misfits:
        return 0
    raise DeviceError(
        f"graph '{role}': {misfits[-1]}, the sizes its engine was built for: send less at once, or build the target with wider "
        "ranges."
    )


def buffer_size(program: Program, name: str, shape: tuple[int, ...]) -> int:
    """Bytes of one of a program's tensors at a shape."""
    return size_of(shape, program.tensors[name].dtype)
