"""What TensorRT's import of `Attention` asks for beyond the standard."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import attribute_float, insert, like, remove_dead, substitute
from vlm_edge_runtime.errors import TargetError

DECOMPOSABLE = "vlm_edge.decomposable"
"""Metadata "1" of an `Attention` that TensorRT may take apart where it has no fused kernel for its shapes.

Without that permission such a build fails. In ONNX it is an attribute, `TRT_decomposable`, that the standard does not know and
ONNX Runtime refuses; whoever parses the graph sets `IAttention.decomposable` on the parsed network instead.
"""


class NativeAttention(GraphPass):
    """Leaves each `Attention` with its one result, and marks it decomposable.

    TensorRT's parser refuses a past, more than one output and a soft-cap, and takes `is_causal` as aligned to the upper left:
    right only where there are as many keys as queries, as in an encoder. StaticCache and DecomposeAttention come before. Raises
    TargetError for what is left of these.
    """

    name: ClassVar[str] = "native_attention"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        for node in list(model.graph):
            if node.op_type != "Attention" or node.domain or (DECOMPOSABLE in node.metadata_props and len(node.outputs) == 1):
                continue
            label = repr(node.name or node.outputs[0].name)
            if any(value is not None for value in node.inputs[4:]) or attribute_float(node, "softcap", 0.0):
                raise TargetError(f"Attention node {label} has a past or a soft-cap, which TensorRT does not import.")
            if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
                raise TargetError(f"Attention node {label} gives more than its result, which TensorRT does not import.")
            node.metadata_props[DECOMPOSABLE] = "1"
            changes.add("marked decomposable")
            if len(node.outputs) > 1:
                made = insert(node, "Attention", node.inputs[:4], dict(node.attributes), name=node.name)
                made.metadata_props.update(node.metadata_props)
                substitute(node.outputs[0], like(made.outputs[0], node.outputs[0]))
                remove_dead(model.graph, node)
                changes.add("outputs dropped")
        return changes
