"""What the GPU engines ask of a compiled graph: `tensorrt_seam` has it over TensorRT and TensorRT-RTX, `ort_cuda_program` over

ONNX Runtime's CUDA provider.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vlm_edge_runtime import _native

Shape = tuple[int, ...]


@dataclass(slots=True, frozen=True)
class TensorInfo:
    """An input or output of a compiled graph; −1 is a dynamic size. `dtype` is a numpy name."""

    name: str
    dtype: str
    shape: Shape
    is_input: bool


@dataclass(slots=True, frozen=True)
class Profile:
    """Smallest and largest shape of each input in one optimisation profile."""

    smallest: Mapping[str, Shape]
    largest: Mapping[str, Shape]

    def misfit(self, shapes: Mapping[str, Sequence[int]]) -> str | None:
        """Which input is outside, in words; None where all fit."""
        for name, shape in shapes.items():
            low, high = self.smallest.get(name), self.largest.get(name)
            if low is None or high is None:
                continue
            if len(low) != len(shape) or any(not a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
                return f"'{name}' {list(shape)} is outside {list(low)} … {list(high)}"
        return None


class Context(Protocol):
    """One way of running a compiled graph: shapes and addresses, which stay until they are set anew."""

    def set_shape(self, name: str, shape: Shape) -> None:
        """Raises DeviceError for a shape outside the profile."""

    def set_address(self, name: str, address: int) -> None: ...
    def set_total(self, entries: int) -> None:
        """How many cache entries are valid after the run, for graphs that are told in host memory."""

    def output_shape(self, name: str) -> Shape:
        """An output's shape, once all inputs have theirs. Raises DeviceError where the graph decides it while it runs."""

    def enqueue(self, stream: int) -> None:
        """Queues a run. Raises DeviceError when TensorRT refuses."""

    def capturable(self, stream: int) -> bool:
        """Whether steps may be launched by the C loop: `enqueue` captured into a CUDA graph, or `frozen` runs."""

    def frozen(self) -> list[_native.BoundRun]:
        """Runs over the present addresses for the C loop to launch; none where `enqueue` is captured with the step's rest."""

    def close(self) -> None: ...


class Program(Protocol):
    """A compiled graph, loaded on the device."""

    tensors: Mapping[str, TensorInfo]
    profiles: Sequence[Profile]

    def alias(self, output: str) -> str | None:
        """The input whose memory an output must be given, where there is one."""

    def context(self, profile: int, *, fixed: bool) -> Context:
        """A new context. `fixed`: its shapes will not change, so that kernels may be tuned to them; contexts of one program

        share their scratch memory and must not run at the same time.
        """

    def close(self) -> None: ...
