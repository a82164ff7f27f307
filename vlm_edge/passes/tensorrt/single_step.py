"""A recurrent decoder's loop over tokens becomes its body: one token a call."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import attribute_ints, substitute
from vlm_edge_runtime.errors import TargetError

from .emit import Emit

_SEQUENCE = "sequence"


class SingleStep(GraphPass):
    """`Scan` over the tokens of a call → what it does for one token; `sequence` is 1 in the graph's inputs from then on.

    Outputs besides `logits` keep the dimension's name, by which callers know which values belong to a token.

    TensorRT compiles a Scan to a loop on the device, and a network with loops cannot be captured in a CUDA graph
    (`IExecutionContext::isStreamCapturable`, TensorRT-RTX 1.2). A recurrent decoder reads its prompt one token after another
    anyway, and its prompt is short. Raises TargetError for a Scan that runs backwards or along another axis, and for several.
    """

    name: ClassVar[str] = "single_step"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        found = [node for node in model.graph if node.op_type == "Scan" and not node.domain]
        if not found:
            return changes
        if len(found) > 1:
            raise TargetError(f"the decoder has {len(found)} Scan nodes; one loop over the tokens is known.")
        _inline(model.graph, found[0])
        for value in model.graph.inputs:
            _one(value)
        for node in model.graph.all_nodes():
            for value in node.outputs:
                if not value.is_graph_output() or value.name == "logits":
                    _one(value)
        changes.add("loops over tokens")
        return changes


def _inline(graph: ir.Graph, scan: ir.Node) -> None:
    label, body = repr(scan.name or scan.outputs[0].name), scan.attributes["body"].as_graph()
    for key in ("scan_input_axes", "scan_output_axes", "scan_input_directions", "scan_output_directions"):
        if any(attribute_ints(scan, key) or ()):
            raise TargetError(f"Scan {label} has {key} {attribute_ints(scan, key)}: only a loop forward over axis 0 is known.")
    scanned = scan.attributes["num_scan_inputs"].as_int()
    states, emit = len(scan.inputs) - scanned, Emit(scan, scan)
    for index, (given, inner) in enumerate(zip(scan.inputs, body.inputs, strict=True)):
        assert given is not None
        if index >= states:
            given = emit("Squeeze", [given, emit.ints([0])], given.dtype, list(given.shape or [])[1:])
        inner.replace_all_uses_with(given)
    results = list(body.outputs)
    body.outputs.clear()
    for name in list(body.initializers):
        weight = body.initializers.pop(name)
        number = 0
        while weight.name in graph.initializers:
            number += 1
            weight.name = f"{name}_{number}"
        graph.register_initializer(weight)
    for node in list(body):
        body.remove(node)
        graph.insert_before(scan, node)
    for index, (result, outer) in enumerate(zip(results, scan.outputs, strict=True)):
        value = result
        if index >= states:
            value = emit("Unsqueeze", [result, emit.ints([0])], outer.dtype, [1, *list(outer.shape or [])[1:]])
        elif outer.is_graph_output() and (result.is_graph_output() or result.is_graph_input()):
            value = emit("Identity", [result], outer.dtype, list(outer.shape or []))
        substitute(outer, value)
    graph.remove(scan, safe=True)


def _one(value: ir.Value) -> None:
    if value.shape is not None and any(str(dim) == _SEQUENCE for dim in value.shape):
        value.shape = ir.Shape([1 if str(dim) == _SEQUENCE else dim for dim in value.shape])
