"""Rotation written out as multiplications becomes one RotaryEmbedding again."""

from __future__ import annotations

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
    """

    name: ClassVar[str] = "recompose_rotary"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        for node in list(model.graph):
            if node.op_type != "Add" or node.domain or node.graph is None or rank(node.outputs[0]) != 4:
                continue
            if (found := _match(node)) is not None:
                source, cos, sin = found
                heads = fixed_dim(source, 1)
                rotated = insert(node, "RotaryEmbedding", [source, cos, sin], {"interleaved": 0, "num_heads": heads or 0})
                rotated.metadata_props.update(node.metadata_props)
                substitute(node.outputs[0], like(rotated.outputs[0], node.outputs[0]))
                remove_dead(model.graph, node)
                changes.add("rotations")
        return changes


def _match(add: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """(x, cosine half, sine half) of a written-out rotation that ends in `add`, else None."""
    products = [producer(value, "Mul") for value in add.inputs]
    for plain, turned in (products, products[::-1]):
        if plain is None or turned is None:
            continue
        for source, cos in _both_ways(plain):
            for half, sin in _both_ways(turned):
                if source is None or not _is_rotated_half(half, source) or only_consumer(turned.outputs[0]) is not add:
                    continue
                cos_half, sin_half = _table(cos, source), _table(sin, source)
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
