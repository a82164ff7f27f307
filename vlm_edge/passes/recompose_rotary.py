"""Rotation written out as multiplications becomes one RotaryEmbedding again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import onnx_ir as ir

from .base import Changes, GraphPass
from .graph import (
    attribute_int,
    constant,
    fixed_dim,
    insert,
    last_axis_slice,
    like,
    only_consumer,
    producer,
    rank,
    remove_dead,
    substitute,
)


class RecomposeRotary(GraphPass):
    """`x · cos + rotate_half(x) · sin` on [batch, heads, sequence, size] → `RotaryEmbedding(x, cos, sin)`.

    The exporter's tracer recognises this for tables made from one row of positions; M-RoPE (Qwen2-VL: a third of each table
    from each of three position axes) comes out as some ten nodes per layer. The tables must be two equal halves by
    construction (`Concat(c, c)`, as RoPE makes them); the operator takes one half, [batch, sequence, size / 2].

    With `interleaved`, the same where neighbours turn together (Cohere 2): tables that repeat each of their numbers, and
    `(−x₁, x₀, −x₃, x₂, …)` as what is turned.
    """

    name: ClassVar[str] = "recompose_rotary"

    def __init__(self, *, interleaved: bool = False) -> None:
        self.interleaved = interleaved

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        halves: dict[ir.Node, ir.Value] = {}
        for node in list(model.graph):
            if node.op_type != "Add" or node.domain or node.graph is None or rank(node.outputs[0]) != 4:
                continue
            neighbours, found = 0, _match(node, _is_rotated_half, _table)
            if found is None and self.interleaved:
                neighbours, found = 1, _match(node, _is_turned_pairs, lambda value, x: _repeated(value, x, halves))
            if found is not None:
                source, cos, sin = found
                attributes = {"interleaved": neighbours, "num_heads": fixed_dim(source, 1) or 0}
                rotated = insert(node, "RotaryEmbedding", [source, cos, sin], attributes)
                rotated.metadata_props.update(node.metadata_props)
                substitute(node.outputs[0], like(rotated.outputs[0], node.outputs[0]))
                remove_dead(model.graph, node)
                changes.add("rotations")
        return changes


def _match(
    add: ir.Node,
    is_turned: Callable[[ir.Value | None, ir.Value], bool],
    table: Callable[[ir.Value | None, ir.Value], ir.Value | None],
) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """(x, cosine half, sine half) of a written-out rotation that ends in `add`, else None."""
    products = [producer(value, "Mul") for value in add.inputs]
    for plain, turned in (products, products[::-1]):
        if plain is None or turned is None:
            continue
        for source, cos in _both_ways(plain):
            for half, sin in _both_ways(turned):
                if source is None or not is_turned(half, source) or only_consumer(turned.outputs[0]) is not add:
                    continue
                cos_half, sin_half = table(cos, source), table(sin, source)
                if cos_half is not None and sin_half is not None:
                    return source, cos_half, sin_half
    return None


def _both_ways(node: ir.Node) -> list[tuple[ir.Value | None, ir.Value | None]]:
    return [(node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])]


def _is_rotated_half(value: ir.Value | None, source: ir.Value) -> bool:
    """Whether `value` is Concat(−second half of `source`, its first half) along the last axis."""
    concat = producer(value, "Concat")
    if concat is None or len(concat.inputs) != 2 or attribute_int(concat, "axis", 0) not in (-1, 3):
        return False
    negated = producer(concat.inputs[0], "Neg")
    size = fixed_dim(source, 3)
    if negated is None or size is None or size % 2:
        return False
    halves = (source, size // 2, size), (source, 0, size // 2)
    return last_axis_slice(negated.inputs[0]) == halves[0] and last_axis_slice(concat.inputs[1]) == halves[1]


def _table(value: ir.Value | None, source: ir.Value) -> ir.Value | None:
    """c [batch, sequence, size / 2] when `value` is Unsqueeze(Concat(c, c), 1), [batch, 1, sequence, size]."""
    node = producer(value, "Unsqueeze")
    axes = constant(node.inputs[1]) if node is not None else None
    if node is None or axes is None or axes.reshape(-1).tolist() != [1]:
        return None
    concat = producer(node.inputs[0], "Concat")
    if concat is None or len(concat.inputs) != 2 or concat.inputs[0] is not concat.inputs[1]:
        return None
    half = concat.inputs[0]
    if attribute_int(concat, "axis", 0) not in (-1, 2) or rank(half) != 3 or half is None or half.shape is None:
        return None
    size = fixed_dim(source, 3)
    return half if size is not None and fixed_dim(half, 2) == size // 2 else None


def _is_turned_pairs(value: ir.Value | None, source: ir.Value) -> bool:
    """Whether `value` is (−x₁, x₀, −x₃, x₂, …) of `source`."""
    merged = producer(value, "Reshape")
    concat = producer(merged.inputs[0], "Concat") if merged is not None else None
    if concat is None or len(concat.inputs) != 2 or attribute_int(concat, "axis", 0) not in (-1, 4):
        return False
    columns = [producer(one, "Unsqueeze") for one in concat.inputs]
    if any(one is None or not _constants(one.inputs[1], ([-1], [4])) for one in columns):
        return False
    odd, even = (one.inputs[0] for one in columns if one is not None)
    negated = producer(odd, "Neg")
    return negated is not None and _every_second(negated.inputs[0], source, 1) and _every_second(even, source, 0)


def _every_second(value: ir.Value | None, source: ir.Value, first: int) -> bool:
    """Whether `value` is source[..., first::2]."""
    node, size = producer(value, "Slice"), fixed_dim(source, 3)
    if node is None or len(node.inputs) != 5 or node.inputs[0] is not source or size is None or size % 2:
        return False
    end = constant(node.inputs[2])
    along = (
        _constants(node.inputs[1], ([first],)) and _constants(node.inputs[3], ([3], [-1])) and _constants(node.inputs[4], ([2],))
    )
    return along and end is not None and end.size == 1 and int(end.reshape(-1)[0]) >= size


def _constants(value: ir.Value | None, wanted: Sequence[list[int]]) -> bool:
    found = constant(value)
    return found is not None and found.reshape(-1).tolist() in wanted


def _repeated(value: ir.Value | None, source: ir.Value, halves: dict[ir.Node, ir.Value]) -> ir.Value | None:
    """f(a) [batch, sequence, size / 2] when `value` [batch, 1, sequence, size] has each number of it twice; f is Cos or Sin."""
    node = producer(value, "Unsqueeze")
    table = producer(node.inputs[0], "Cos", "Sin") if node is not None and _constants(node.inputs[1], ([1],)) else None
    merged = producer(table.inputs[0], "Reshape") if table is not None else None
    twice = producer(merged.inputs[0], "Expand") if merged is not None else None
    column = producer(twice.inputs[0], "Unsqueeze") if twice is not None else None
    if table is None or twice is None or column is None or not _constants(column.inputs[1], ([3], [-1])):
        return None
    angles, size = column.inputs[0], fixed_dim(source, 3)
    if (
        angles is None
        or rank(angles) != 3
        or size is None
        or fixed_dim(angles, 2) != size // 2
        or fixed_dim(twice.outputs[0], 3) != 2
    ):
        return None
    if table not in halves:
        halves[table] = like(insert(table, table.op_type, [angles]).outputs[0], angles)
    return halves[table]
