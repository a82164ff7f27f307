"""Quantised weights back as plain ones: what a Q/DQ graph computes where no kernel for its number format exists."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import add_initializer, attribute_int, is_weight, lazy_tensor, producer, remove_dead, substitute


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
            assert out.dtype is not None
            shape = _codes(out).shape
            name = f"{node.inputs[0].name}.folded"  # type: ignore[union-attr]
            dtype, numpy = out.dtype, out.dtype.numpy()
            folded = lazy_tensor(name, dtype, shape, lambda out=out, numpy=numpy: _value(out).astype(numpy))  # type: ignore[misc]
            substitute(out, add_initializer(graph, name, folded))
            remove_dead(graph, node)
            changes.add("weights folded")
        return changes


def _stored(value: ir.Value | None) -> bool:
    if is_weight(value):
        return True
    node = producer(value, "DequantizeLinear")
    return node is not None and all(given is None or _stored(given) for given in node.inputs)


def _codes(value: ir.Value) -> npt.NDArray[np.generic]:
    node = producer(value, "DequantizeLinear")
    assert node is not None and node.inputs[0] is not None and node.inputs[0].const_value is not None
    return np.asarray(node.inputs[0].const_value.numpy())


def _value(value: ir.Value) -> npt.NDArray[np.float32]:
    """The float32 value of a stored tensor or of DequantizeLinear of stored tensors."""
    node = producer(value, "DequantizeLinear")
    if node is None:
        assert value.const_value is not None
        return np.asarray(value.const_value.numpy()).astype(np.float32)
    codes = _codes(value).astype(np.float32)
    scale = _value(node.inputs[1])  # type: ignore[arg-type]
    axis, block = attribute_int(node, "axis", 1), attribute_int(node, "block_size", 0)
    if block:
        return codes * np.repeat(scale, block, axis=axis)
    if scale.size == 1:
        return codes * scale.reshape(())
    return codes * scale.reshape([-1 if one == axis % codes.ndim else 1 for one in range(codes.ndim)])
