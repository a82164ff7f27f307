"""Undoes the flattening of [batch, sequence, width] to [rows, width] around a feed-forward block."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from .base import Changes, GraphPass
from .graph import consumers, fixed_dim, is_weight, rank, remove_dead
from .layout import copies_dims
from .rowwise import is_rowwise


class Unflatten(GraphPass):
    """Runs row-wise nodes on [batch, sequence, width] directly where the model had flattened it to [rows, width].

    OPT and GPT-2 wrap their layers in Reshape pairs for Gemm. Without them the residual stream has one shape, so additions
    meet their normalisation (fusable) and the last token's row can be picked before the work instead of after it.
    """

    name: ClassVar[str] = "unflatten"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        for node in list(model.graph):
            if node.graph is not None and _is_flattening(node):
                changes.add("flattened blocks", _unflatten(node))
        return changes


def _is_flattening(node: ir.Node) -> bool:
    """Reshape from [batch, sequence, width] to [rows, width]."""
    if node.op_type != "Reshape" or node.domain or rank(node.inputs[0]) != 3 or rank(node.outputs[0]) != 2:
        return False
    width = fixed_dim(node.inputs[0], 2)
    return width is not None and width == fixed_dim(node.outputs[0], 1) and not node.outputs[0].is_graph_output()


def _unflatten(start: ir.Node) -> int:
    """Rewires the block that begins at one flattening Reshape; returns how many Reshapes fell away (0: not possible)."""
    source = start.inputs[0]
    assert source is not None and source.shape is not None
    entries: dict[ir.Value, ir.Value] = {start.outputs[0]: source}
    block: list[ir.Node] = []
    exits: list[ir.Node] = []
    todo = consumers(start.outputs[0])
    while todo:
        node = todo.pop()
        if node in block or node in exits:
            continue
        if node.op_type == "Reshape" and not node.domain:
            if copies_dims(node) and rank(node.outputs[0]) != 3:
                return 0
            exits.append(node)
            continue
        if not is_rowwise(node, ranks=(2,)) or any(out.is_graph_output() for out in node.outputs):
            return 0
        for value in node.inputs:
            if value is None or is_weight(value) or (maker := value.producer()) in block or value in entries:
                continue
            if maker is not None and _is_flattening(maker) and _same_rows(maker.inputs[0], source):
                entries[value] = maker.inputs[0]  # type: ignore[assignment]
            elif maker is not None and is_rowwise(maker, ranks=(2,)):
                todo.append(maker)
            else:
                return 0
        block.append(node)
        todo += [user for out in node.outputs for user in consumers(out)]
    batch, sequence = source.shape[0], source.shape[1]
    for node in block:
        for index, value in enumerate(node.inputs):
            if value in entries:
                node.replace_input_with(index, entries[value])
        for out in node.outputs:
            if out.shape is not None:
                out.shape = ir.Shape([batch, sequence, out.shape[-1]])
    for node in exits:
        if node.inputs[0] in entries:
            node.replace_input_with(0, entries[node.inputs[0]])
    if not block:
        return 0
    for value in entries:
        if (maker := value.producer()) is not None and isinstance(maker.graph, ir.Graph):
            remove_dead(maker.graph, maker)
    return len(entries)


def _same_rows(value: ir.Value | None, other: ir.Value) -> bool:
    """Whether two [batch, sequence, ·] values have the same rows."""
    if value is None or value.shape is None or other.shape is None or len(value.shape) != 3:
        return False
    return all(str(a) == str(b) and str(a) != "None" for a, b in zip(value.shape[:2], other.shape[:2], strict=True))
