"""Which whole numbers a graph accepts: how many rows the tables have that its integer inputs index."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from vlm_edge.passes.graph import fixed_dim, is_weight, scalar

_SAME_NUMBERS = frozenset(
    {"Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Flatten", "Expand", "Slice", "Concat", "Split", "Clip"}
)


def id_limits(path: Path) -> dict[str, int]:
    """Integer inputs of a graph that look up rows of stored tables → the fewest rows of those tables."""
    found: dict[str, int] = {}
    for value in ir.load(path).graph.inputs:
        if value.dtype in (ir.DataType.INT64, ir.DataType.INT32) and (limit := _limit(value)) is not None:
            found[str(value.name)] = limit
    return found


def _limit(value: ir.Value) -> int | None:
    limits: list[int] = []
    seen: set[ir.Value] = set()
    todo: list[tuple[ir.Value, int]] = [(value, 0)]
    while todo:
        current, offset = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for node, index in current.uses():
            if node.domain:
                continue
            if node.op_type == "Gather" and index == 1 and is_weight(node.inputs[0]):
                axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                if (rows := fixed_dim(node.inputs[0], axis)) is not None:
                    limits.append(rows - offset)
            elif (node.op_type in _SAME_NUMBERS and index == 0) or node.op_type == "Concat":
                todo += [(out, offset) for out in node.outputs]
            elif node.op_type == "Add" and (more := scalar(node.inputs[1 - index])) is not None:
                todo += [(out, offset + int(more)) for out in node.outputs]
    return min(limits, default=None)
