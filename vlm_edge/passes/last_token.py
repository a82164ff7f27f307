"""Computes the logits of the last token only."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from vlm_edge_runtime.errors import TargetError

from .base import Changes, GraphPass
from .graph import add_initializer, consumers, fixed_dim, insert, is_weight, rank, substitute, typed
from .rowwise import is_rowwise


class LastTokenLogits(GraphPass):
    """Picks the last position before the head: logits become [batch, 1, vocabulary].

    Generation needs one row of logits per step, and a prompt of 1,000 tokens would otherwise compute 1,000 rows of the
    vocabulary. The pick goes as far back as every node treats rows by themselves and nothing else reads them: past the
    final norm and the last layer's feed-forward block, up to that layer's attention, which alone needs all positions.
    Needs rows without padding at their end (the GroupQueryAttention contract).
    """

    name: ClassVar[str] = "last_token_logits"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        graph = model.graph
        logits = next((value for value in graph.outputs if value.name == "logits"), None)
        if logits is None or rank(logits) != 3:
            raise TargetError(f"the decoder has no output 'logits' of rank 3; its outputs: {[v.name for v in graph.outputs]}.")
        if fixed_dim(logits, 1) == 1:
            return changes
        region = _region(graph, logits)
        last = add_initializer(graph, "last_token.index", np.array([-1], np.int64))
        if not region:
            maker = logits.producer()
            if maker is None:
                raise TargetError("the decoder's logits are not computed by any node.")
            _pick_after(graph, maker, logits, last)
            changes.add("rows picked after the head")
            return changes
        picked: dict[ir.Value, ir.Value] = {}
        for node in [node for node in graph if node in region]:
            for index, value in enumerate(node.inputs):
                if value is None or is_weight(value) or value.producer() in region:
                    continue
                if value not in picked:
                    picked[value] = _pick(node, value, last)
                node.replace_input_with(index, picked[value])
            for out in node.outputs:
                if out.shape is not None and len(out.shape) == 3:
                    out.shape = ir.Shape([out.shape[0], 1, out.shape[2]])
        changes.add("nodes on the last row only", len(region))
        changes.add("rows picked", len(picked))
        return changes


def _region(graph: ir.Graph, logits: ir.Value) -> set[ir.Node]:
    """The nodes from which only the logits can be reached, by row-wise nodes alone."""
    region: set[ir.Node] = set()
    for node in reversed(list(graph)):
        outs = [out for out in node.outputs if out.uses() or out.is_graph_output()]
        if not outs or not is_rowwise(node):
            continue
        if all((out is logits or not out.is_graph_output()) and all(user in region for user in consumers(out)) for out in outs):
            region.add(node)
    return region if logits.producer() in region else set()


def _pick(before: ir.Node, value: ir.Value, last: ir.Value) -> ir.Value:
    assert value.shape is not None
    picked = insert(before, "Gather", [value, last], {"axis": 1}).outputs[0]
    return typed(picked, value.dtype, [value.shape[0], 1, value.shape[2]])


def _pick_after(graph: ir.Graph, maker: ir.Node, logits: ir.Value, last: ir.Value) -> None:
    assert logits.shape is not None
    node = ir.node("Gather", [logits, last], {"axis": 1})
    graph.insert_after(maker, node)
    typed(node.outputs[0], logits.dtype, [logits.shape[0], 1, logits.shape[2]])
    users = [(use.node, use.idx) for use in logits.uses() if use.node is not node]
    substitute(logits, node.outputs[0])
    node.replace_input_with(0, logits)
    for user, index in users:
        user.replace_input_with(index, logits)
