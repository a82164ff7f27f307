"""`RotaryEmbedding` written out, for parsers that do not know it."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import attribute_int, fixed_dim, rank, remove_dead, substitute
from vlm_edge.passes.heads import merge_heads, split_heads
from vlm_edge_runtime.errors import TargetError

from .emit import Dim, Emit


class DecomposeRotary(GraphPass):
    """`RotaryEmbedding` (opset 23) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin) (arXiv 2104.09864, section 3.4.2).

    x₁ and x₂ are the halves of each head, or its even and odd entries where `interleaved`; entries beyond `rotary_embedding_dim`
    pass as they are.
    """

    name: ClassVar[str] = "decompose_rotary"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        for node in list(model.graph):
            if node.op_type == "RotaryEmbedding" and not node.domain:
                _rotate(model.graph, node)
                changes.add("rotations written out")
        return changes


def _rotate(graph: ir.Graph, node: ir.Node) -> None:
    source, flat = node.inputs[0], rank(node.inputs[0]) == 3
    heads, width = attribute_int(node, "num_heads", 0), fixed_dim(source, -1)
    if source is None or width is None or (flat and not heads):
        raise TargetError(f"RotaryEmbedding {node.name or node.outputs[0].name!r}: the size of a head must be a fixed number.")
    if flat:
        source = split_heads(node, source, heads, width // heads)
    assert source.shape is not None
    emit, dtype = Emit(node, node), source.dtype
    batch, count, sequence, size = source.shape
    rotated = attribute_int(node, "rotary_embedding_dim", 0) or fixed_dim(source, 3) or 0
    half = rotated // 2
    table: list[Dim] = [batch, 1, sequence, half]
    cos, sin = (_table(emit, node, index, dtype, table) for index in (1, 2))
    part: list[Dim] = [batch, count, sequence, half]

    def cut(start: int, end: int, step: int = 1) -> ir.Value:
        bounds = [emit.ints([start]), emit.ints([end]), emit.ints([3]), emit.ints([step])]
        return emit("Slice", [source, *bounds], dtype, [batch, count, sequence, (end - start + step - 1) // step])

    interleaved = bool(attribute_int(node, "interleaved", 0))
    first, second = (cut(0, rotated, 2), cut(1, rotated, 2)) if interleaved else (cut(0, half), cut(half, rotated))

    def mixed(op: str, left: ir.Value, right: ir.Value) -> ir.Value:
        products = [emit("Mul", [left, cos], dtype, part), emit("Mul", [right, sin], dtype, part)]
        return emit(op, products, dtype, part)

    turned = [mixed("Sub", first, second), mixed("Add", second, first)]
    whole: list[Dim] = [batch, count, sequence, rotated]
    if interleaved:
        pairs = [emit("Unsqueeze", [value, emit.ints([4])], dtype, [*part, 1]) for value in turned]
        stacked = emit("Concat", pairs, dtype, [*part, 2], {"axis": 4})
        result = emit("Reshape", [stacked, emit.ints([0, 0, 0, rotated])], dtype, whole)
    else:
        result = emit("Concat", turned, dtype, whole, {"axis": 3})
    if isinstance(size, int) and rotated < size:
        result = emit("Concat", [result, cut(rotated, size)], dtype, [*whole[:3], size], {"axis": 3})
    substitute(node.outputs[0], merge_heads(node, result) if flat else result)
    remove_dead(graph, node)


def _table(emit: Emit, node: ir.Node, index: int, dtype: ir.DataType | None, shape: list[Dim]) -> ir.Value:
    """Cosines or sines as [batch, 1, sequence, half]: given per token, or looked up by `position_ids`."""
    table = node.inputs[index]
    assert table is not None
    positions = node.inputs[3] if len(node.inputs) > 3 else None
    batch, _, sequence, half = shape
    if positions is not None:
        table = emit("Gather", [table, positions], dtype, [batch, sequence, half], {"axis": 0})
    return emit("Unsqueeze", [table, emit.ints([1])], dtype, shape)
