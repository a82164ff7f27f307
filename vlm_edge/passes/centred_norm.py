"""A norm of what its mean was taken from is LayerNormalization."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from .base import Changes, GraphPass
from .graph import attribute_float, attribute_int, constant, insert, like, producer, rank, remove_dead, substitute


class FuseCentredNorm(GraphPass):
    """`RMSNormalization(x − mean(x), w)` → `LayerNormalization(x, w)`, as Cohere's decoders write it.

    The variance is the mean of (x − mean)², so that both are (x − mean) / sqrt(variance + epsilon) · w.
    """

    name: ClassVar[str] = "fuse_centred_norm"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        for node in [node for node in model.graph if node.op_type == "RMSNormalization" and not node.domain]:
            source = _centred(node)
            if source is None:
                continue
            attributes = {"axis": -1, "epsilon": attribute_float(node, "epsilon", 1e-5)}
            fused = insert(node, "LayerNormalization", [source, node.inputs[1]], attributes, name=node.name)
            fused.metadata_props.update(node.metadata_props)
            substitute(node.outputs[0], like(fused.outputs[0], node.outputs[0]))
            remove_dead(model.graph, node)
            changes.add("x − mean(x) and its norm")
        return changes


def _centred(norm: ir.Node) -> ir.Value | None:
    """x where the node's input is x − mean(x) over the last axis, which is all that it normalises."""
    size = rank(norm.inputs[0]) or 0
    difference = producer(norm.inputs[0], "Sub")
    mean = producer(difference.inputs[1], "ReduceMean") if difference is not None else None
    if difference is None or mean is None or mean.inputs[0] is not difference.inputs[0]:
        return None
    axes = constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if axes is None or axes.reshape(-1).tolist() not in ([-1], [size - 1]) or not attribute_int(mean, "keepdims", 1):
        return None
    if attribute_int(norm, "axis", -1) not in (-1, size - 1) or any(out.uses() for out in norm.outputs[1:]):
        return None
    return difference.inputs[0]
