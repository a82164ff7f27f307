"""The one place that knows `tensorrt` and `tensorrt_rtx` apart: which is wanted, which is there, and what each cannot do."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from vlm_edge.targets.target import Target

Flavour = Literal["tensorrt", "tensorrt-rtx"]

AHEAD_OF_TIME_SM = (75, 80, 86, 89, 120, 121)
"""Compute capabilities that TensorRT-RTX compiles for on any machine, without the GPU (1.7)."""


@dataclass(slots=True, frozen=True)
class Library:
    """An imported TensorRT: its module, which of the two it is, and its version (`10.16.1.11`)."""

    module: ModuleType
    flavour: Flavour
    version: str


def load_library(target: Target) -> Library:
    """The TensorRT that a target's backend wants. Raises TargetError: not installed, or a version the target does not allow."""
    raise NotImplementedError
