"""Number formats of the Q/DQ graphs that TensorRT takes: codes and scales of stored weights. All symmetric, no zero points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.graph import add_initializer, lazy_tensor

Floats = npt.NDArray[np.float32]

_SMALLEST_SCALE = 2.0**-20
"""Scales are stored in half precision; below this fp16 has too few digits left to tell one from the next."""


@dataclass(slots=True, frozen=True)
class NumberFormat:
    """One element type: its largest code (what the largest magnitude is mapped to) and how numpy calls it."""

    name: str
    onnx: ir.DataType
    numpy: npt.DTypeLike
    top: float

    def codes(self, scaled: Floats) -> npt.NDArray[np.generic]:
        """Values divided by their scale → codes, rounded to nearest even and clipped to ± top."""
        clipped = np.clip(scaled, -self.top, self.top)
        rounded = np.rint(clipped) if self.name.startswith("int") else clipped
        return np.asarray(rounded.astype(self.numpy))


INT8 = NumberFormat("int8", ir.DataType.INT8, np.int8, 127.0)
INT4 = NumberFormat("int4", ir.DataType.INT4, ml_dtypes.int4, 7.0)
FP8 = NumberFormat("fp8", ir.DataType.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn, 448.0)
"""E4M3: https://arxiv.org/abs/2209.05433; its largest number is 448."""
FP4 = NumberFormat("fp4", ir.DataType.FLOAT4E2M1, ml_dtypes.float4_e2m1fn, 6.0)


def at_least_opset(graph: ir.Graph, version: int) -> None:
    """Says that the graph is of this opset where it was of an older one (from 20 on: the operators in use did not change)."""
    graph.opset_imports[""] = max(version, graph.opset_imports.get("", version))


def stored_scales(scales: npt.NDArray[np.floating], half: npt.DTypeLike) -> Floats:
    """Scales as the typed graph will hold them: rounded to `half`, none too small for it.

    Codes must be computed from these, or the rounding of a scale shifts every weight under it. A scale of zeros becomes 1.
    """
    kept = np.where(scales > 0, np.maximum(scales, _SMALLEST_SCALE), 1.0).astype(np.float32)
    return np.asarray(kept.astype(half).astype(np.float32))


def largest_per_channel(weight: Floats, axis: int) -> Floats:
    """The largest magnitude of each index of `axis`: float32 [channels]. Raises ValueError on NaN or infinity."""
    others = tuple(one for one in range(weight.ndim) if one != axis)
    found = np.abs(weight).max(axis=others)
    if not np.isfinite(found).all():
        raise ValueError("the weight has NaN or infinite values: it cannot be quantised")
    return np.asarray(found, np.float32)


def read_weight(value: ir.Value) -> tuple[Callable[[], Floats], tuple[int, ...]]:
    """(a function that reads a stored weight as float32, its shape)."""
    tensor = value.const_value
    assert tensor is not None
    return lambda: np.asarray(tensor.numpy(), np.float32), tuple(int(size) for size in tensor.shape.numpy())


def store_per_channel(
    graph: ir.Graph, weight: ir.Value, form: NumberFormat, axis: int, half: npt.DTypeLike
) -> tuple[ir.Value, ir.Value]:
    """(codes, scales float32 [channels]) of a stored weight, one scale per index of `axis`; codes are computed when saved."""
    read, shape = read_weight(weight)
    scales = stored_scales(largest_per_channel(read(), axis) / form.top, half)
    broad = scales.reshape([-1 if one == axis else 1 for one in range(len(shape))])
    name = f"{weight.name}.{form.name}"
    codes = lazy_tensor(name, form.onnx, shape, lambda: form.codes(read() / broad))
    return add_initializer(graph, name, codes), add_initializer(graph, f"{name}.scales", scales)
