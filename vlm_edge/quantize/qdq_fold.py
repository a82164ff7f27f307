"""Quantised weights back as plain ones: what a Q/DQ graph computes where no kernel for its number format exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import add_initializer, attribute_int, is_weight, lazy_tensor, producer, remove_dead, substitute

Floats = npt.NDArray[np.float32]


class FoldWeights(GraphPass):
    """`DequantizeLinear` of stored tensors → the stored tensor that it gives, in the type that it gives.

    For checking only: ONNX Runtime's CPU provider has no 4-bit floating point, and a graph whose weights were dequantised by
    numpy is an independent witness for the other formats. The arithmetic is the operator's definition
    (https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html): codes · scale, per tensor, per axis or per block.
    """

    name: ClassVar[str] = "fold_weights"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        graph = model.graph
        for node in list(graph):
            if node.op_type != "DequantizeLinear" or node.domain or node.graph is None or not _stored(node.outputs[0]):
                continue
            out = node.outputs[0]
            if any(user.op_type == "DequantizeLinear" for user in out.consumers()):
                continue  # scales of another weight: they go with it
            codes = node.inputs[0]
            assert out.dtype is not None and codes is not None and codes.const_value is not None
            name, shape = f"{codes.name}.folded", tuple(int(size) for size in codes.const_value.shape.numpy())
            folded = lazy_tensor(name, out.dtype, shape, _converted(_reader(out), out.dtype))
            substitute(out, add_initializer(graph, name, folded))
            remove_dead(graph, node)
            changes.add("weights folded")
        return changes


def _stored(value: ir.Value | None) -> bool:
    if is_weight(value):
        return True
    node = producer(value, "DequantizeLinear")
    return node is not None and all(given is None or _stored(given) for given in node.inputs)


def _converted(read: Callable[[], Floats], dtype: ir.DataType) -> Callable[[], npt.NDArray[np.generic]]:
    return lambda: np.asarray(read().astype(dtype.numpy()))


def _reader(value: ir.Value | None) -> Callable[[], Floats]:
    """Computes the float32 value of a stored tensor or of DequantizeLinear of stored tensors; holds no node."""
    node = producer(value, "DequantizeLinear")
    if node is None:
        assert value is not None and value.const_value is not None
        tensor = value.const_value
        return lambda: np.asarray(tensor.numpy()).astype(np.float32)
    codes, scales = (_reader(given) for given in node.inputs[:2])
    axis, block = attribute_int(node, "axis", 1), attribute_int(node, "block_size", 0)

    def compute() -> Floats:
        numbers, scale = codes(), scales()
        if block:
            return np.asarray(numbers * np.repeat(scale, block, axis=axis))
        if scale.size == 1:
            return np.asarray(numbers * scale.reshape(()))
        return np.asarray(numbers * scale.reshape([-1 if one == axis % numbers.ndim else 1 for one in range(numbers.ndim)]))

    return compute
