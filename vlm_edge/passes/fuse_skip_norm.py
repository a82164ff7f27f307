"""Residual addition and normalisation become one node."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from .base import Changes, GraphPass
from .graph import (
    MICROSOFT,
    attribute_float,
    attribute_int,
    consumers,
    insert,
    is_weight,
    like,
    only_consumer,
    producer,
    rank,
    remove_dead,
    same_shape,
    substitute,
)

_FUSED = {"RMSNormalization": "SkipSimplifiedLayerNormalization", "LayerNormalization": "SkipLayerNormalization"}
_SUM = 3
"""Output of the fused node that holds the sum (for the residual stream to go on)."""


class FuseSkipNorm(GraphPass):
    """`Norm(Add(x, y))` → SkipSimplifiedLayerNormalization (RMSNormalization) or SkipLayerNormalization (LayerNormalization).

    One pass over the residual stream instead of two. ONNX Runtime fuses the LayerNormalization form itself only when nothing
    else reads the sum, which is never so in a pre-norm transformer, and the RMSNormalization form not at all. A bias added
    to one branch just before (a linear layer's) goes in as well.
    """

    name: ClassVar[str] = "fuse_skip_norm"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        for node in list(model.graph):
            if node.domain or node.op_type not in _FUSED:
                continue
            add = producer(node.inputs[0], "Add")
            if add is not None and _fusable(node, add):
                changes.add(f"Add + {node.op_type}")
                changes.add("biases taken in", _fuse(model.graph, node, add))
        return changes


def _fusable(norm: ir.Node, add: ir.Node) -> bool:
    left, right = add.inputs[:2]
    if is_weight(left) or is_weight(right) or not same_shape(left, right) or rank(left) not in (2, 3):
        return False
    if left is None or left.dtype != ir.DataType.FLOAT or attribute_int(norm, "axis", -1) not in (-1, (rank(left) or 0) - 1):
        return False
    if any(out.uses() or out.is_graph_output() for out in norm.outputs[1:]) or add.outputs[0].is_graph_output():
        return False
    return is_weight(norm.inputs[1]) and rank(norm.inputs[1]) == 1


def _fuse(graph: ir.Graph, norm: ir.Node, add: ir.Node) -> int:
    """Replaces the pair; returns 1 when a bias went in."""
    left, right = add.inputs[:2]
    bias: ir.Value | None = None
    for value, other in ((right, left), (left, right)):
        linear = producer(value, "Add")
        if linear is None or value is None or only_consumer(value) is not add:
            continue
        stored = [v for v in linear.inputs if is_weight(v) and rank(v) == 1]
        computed = [v for v in linear.inputs if not is_weight(v)]
        if len(stored) == 1 and len(computed) == 1 and same_shape(computed[0], value):
            left, right, bias = other, computed[0], stored[0]
            break
    if norm.op_type == "RMSNormalization":
        inputs = [left, right, norm.inputs[1], *([bias] if bias is not None else [])]
    else:
        beta = norm.inputs[2] if len(norm.inputs) > 2 else None
        inputs = [left, right, norm.inputs[1], beta, *([bias] if bias is not None else [])]
    # At the Add's place: its other readers may come before the norm.
    fused = insert(
        add,
        _FUSED[norm.op_type],
        inputs,
        {"epsilon": attribute_float(norm, "epsilon", 1e-5)},
        domain=MICROSOFT,
        outputs=4,
        name=norm.name,
    )
    fused.metadata_props.update(norm.metadata_props)
    like(fused.outputs[0], norm.outputs[0])
    like(fused.outputs[_SUM], add.outputs[0])
    for unused in fused.outputs[1:_SUM]:
        unused.name = ""
    substitute(norm.outputs[0], fused.outputs[0])
    if consumers(add.outputs[0]) == [norm]:
        fused.outputs[_SUM].name = ""
        fused.resize_outputs(1)
    else:
        substitute(add.outputs[0], fused.outputs[_SUM])
    remove_dead(graph, norm, add)
    return int(bias is not None)
