"""int64 inputs and outputs become int32."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import typed

_INDEXED = {("Gather", 1), ("GatherElements", 1)}
"""(operator, input) that takes int32 as well as int64."""


class NarrowIntegers(GraphPass):
    """int64 graph inputs and outputs become int32: half the bytes to move, and no warning of TensorRT's parser.

    Inside, an input that something reads as int64 is cast back, unless it is cast anyway or only looks up rows of a table. Ids,
    positions and masks fit in 31 bits by far.
    """

    name: ClassVar[str] = "narrow_integers"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        for value in model.graph.inputs:
            if value.dtype == ir.DataType.INT64:
                _input(model.graph, value)
                changes.add("inputs")
        for index, value in enumerate(model.graph.outputs):
            if value.dtype == ir.DataType.INT64:
                _output(model.graph, index, value)
                changes.add("outputs")
        return changes


def _input(graph: ir.Graph, value: ir.Value) -> None:
    users = [(use.node, use.idx) for use in value.uses()]
    value.type = ir.TensorType(ir.DataType.INT32)
    wide = [(node, index) for node, index in users if not _takes_int32(node, index)]
    for node, _ in users:
        if (
            node.op_type == "Cast"
            and node.attributes["to"].as_int() == ir.DataType.INT32
            and not node.outputs[0].is_graph_output()
        ):
            node.outputs[0].replace_all_uses_with(value)
    if not wide:
        return
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.INT64)}, name=f"{value.name}.int64")
    typed(cast.outputs[0], ir.DataType.INT64, value.shape or [])
    first = next((node for node in graph), None)
    assert first is not None
    graph.insert_before(first, cast)
    for node, index in wide:
        node.replace_input_with(index, cast.outputs[0])


def _takes_int32(node: ir.Node, index: int) -> bool:
    return not node.domain and (node.op_type in ("Cast", "Shape") or (node.op_type, index) in _INDEXED)


def _output(graph: ir.Graph, index: int, value: ir.Value) -> None:
    name, maker = value.name, value.producer()
    assert maker is not None
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.INT32)}, name=f"{name}.int32")
    cast.metadata_props.update(maker.metadata_props)
    graph.insert_after(maker, cast)
    typed(cast.outputs[0], ir.DataType.INT32, value.shape or [])
    value.name = f"{name}.int64"
    cast.outputs[0].name = name
    graph.outputs[index] = cast.outputs[0]
