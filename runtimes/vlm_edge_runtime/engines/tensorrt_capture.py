"""Capturing what a decode step queues, and freeing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vlm_edge_runtime import _native
from vlm_edge_runtime.errors import DeviceError

from .cuda_device import Device
from .tensorrt_contexts import BoundContext
from .tensorrt_program import Shape

Pieces = tuple[int | _native.BoundRun, ...]
"""What a step launches, one after another: handles of captured CUDA graphs, runs of ONNX Runtime."""


@dataclass(slots=True)
class Decode:
    """The contexts of the present shapes, and what was captured with them."""

    embed: BoundContext
    decoder: BoundContext
    generation: int
    outputs: dict[str, Shape]
    warm: set[int] = field(default_factory=set)
    graphs: dict[int, Pieces] = field(default_factory=dict)


def captured(device: Device, queue: Callable[[], None]) -> int:
    """The handle of a CUDA graph of what `queue` queues. Raises what that raises, or DeviceError."""
    device.begin_capture()
    try:
        queue()
    except BaseException:
        _abandon(device)
        raise
    return device.end_capture()


def free_pieces(device: Device, pieces: Pieces) -> None:
    """Frees the graphs; runs go with their last reference."""
    for piece in pieces:
        if isinstance(piece, int):
            device.free_graph(piece)


def _abandon(device: Device) -> None:
    try:
        device.free_graph(device.end_capture())
    except DeviceError:
        return  # what made the capture fail is told by the caller's exception
