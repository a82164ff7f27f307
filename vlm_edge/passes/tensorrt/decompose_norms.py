"""Normalisations that a TensorRT does not import (or reads differently), written out."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import attribute_float, attribute_int, fixed_dim, rank, remove_dead, substitute
from vlm_edge_runtime.errors import TargetError

from .emit import Dim, Emit


class DecomposeRMSNormalization(GraphPass):
    """`RMSNormalization` (opset 23) → x / √(mean(x²) + ε) · weight (arXiv 1910.07467), marked for fp32 up to the weight.

    For TensorRT before 10.15, whose parser does not know the operator.
    """

    name: ClassVar[str] = "decompose_rms_normalization"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        for node in list(model.graph):
            if node.op_type == "RMSNormalization" and not node.domain:
                _rms(model.graph, node)
                changes.add("normalisations")
        return changes


class DecomposeGroupNormalization(GraphPass):
    """`GroupNormalization` (arXiv 1803.08494) → (x − mean) / √(variance + ε) over each group, · weight + bias per channel.

    Its weights are one per channel since opset 21 and one per group before: written out, no parser takes the one for the other.
    """

    name: ClassVar[str] = "decompose_group_normalization"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        if (model.graph.opset_imports.get("") or 0) < 21:
            return changes
        for node in list(model.graph):
            if node.op_type == "GroupNormalization" and not node.domain:
                _group(model.graph, node)
                changes.add("normalisations")
        return changes


def _rms(graph: ir.Graph, node: ir.Node) -> None:
    source, weight = node.inputs[:2]
    assert source is not None and weight is not None
    dims = rank(source)
    if dims is None or source.shape is None:
        raise TargetError(f"RMSNormalization {node.name or node.outputs[0].name!r}: the rank of its input must be known.")
    axis = attribute_int(node, "axis", -1)
    axes = list(range(axis if axis >= 0 else axis + dims, dims))
    shape: list[Dim] = list(source.shape)
    one: list[Dim] = [1 if index in axes else dim for index, dim in enumerate(shape)]
    emit = Emit(node, node)
    square = emit("Mul", [source, source], source.dtype, shape, full=True)
    mean = emit("ReduceMean", [square, emit.ints(axes)], source.dtype, one, {"keepdims": 1}, full=True)
    normal = _divided(emit, source, mean, attribute_float(node, "epsilon", 1e-5), shape, one)
    substitute(node.outputs[0], emit("Mul", [normal, weight], source.dtype, shape))
    remove_dead(graph, node)


def _group(graph: ir.Graph, node: ir.Node) -> None:
    source, weight, bias = node.inputs[:3]
    groups, channels, dims = attribute_int(node, "num_groups", 0), fixed_dim(node.inputs[0], 1), rank(node.inputs[0])
    if source is None or source.shape is None or weight is None or bias is None or not groups or not channels or not dims:
        raise TargetError(f"GroupNormalization {node.name or node.outputs[0].name!r}: its number of channels must be fixed.")
    emit, dtype, batch = Emit(node, node), source.dtype, source.shape[0]
    flat: list[Dim] = [batch, groups, None]
    one: list[Dim] = [batch, groups, 1]
    size = emit("Shape", [source], ir.DataType.INT64, [dims])
    rows = emit("Reshape", [source, emit.ints([0, groups, -1])], dtype, flat)
    mean = emit("ReduceMean", [rows, emit.ints([2])], dtype, one, {"keepdims": 1}, full=True)
    apart = emit("Sub", [rows, mean], dtype, flat, full=True)
    square = emit("Mul", [apart, apart], dtype, flat, full=True)
    variance = emit("ReduceMean", [square, emit.ints([2])], dtype, one, {"keepdims": 1}, full=True)
    normal = _divided(emit, apart, variance, attribute_float(node, "epsilon", 1e-5), flat, one)
    result = emit("Reshape", [normal, size], dtype, list(source.shape))
    column = [channels, *[1] * (dims - 2)]
    for op, value in (("Mul", weight), ("Add", bias)):
        result = emit(op, [result, emit("Reshape", [value, emit.ints(column)], dtype, column)], dtype, list(source.shape))
    substitute(node.outputs[0], result)
    remove_dead(graph, node)


def _divided(emit: Emit, value: ir.Value, square: ir.Value, epsilon: float, shape: list[Dim], one: list[Dim]) -> ir.Value:
    """value / √(square + ε)."""
    small = emit.const(f"epsilon.{epsilon!r}", epsilon, np.float32)
    root = emit("Sqrt", [emit("Add", [square, small], value.dtype, one, full=True)], value.dtype, one, full=True)
    return emit("Div", [value, root], value.dtype, shape, full=True)
