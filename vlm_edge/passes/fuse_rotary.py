"""Rotary position embedding moves into GroupQueryAttention."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .base import Changes, GraphPass
from .cleanup import Cleanup
from .evaluate import evaluate, graph_inputs_of
from .graph import MICROSOFT, add_initializer, attribute_int, constant, fixed_dim, insert, producer, rank, typed
from .heads import merge_heads
from .layout import CancelLayout

_MULTIPLE = 16
"""ONNX Runtime's CPU kernel fuses rotation for head sizes that are a multiple of this."""


class FuseRotaryEmbedding(GraphPass):
    """`GroupQueryAttention(RotaryEmbedding(q), RotaryEmbedding(k))` → `GroupQueryAttention(do_rotary=1)` with cached tables.

    The cosine and sine that feed the rotation are functions of `position_ids` alone, whatever the scaling (linear, NTK,
    YaRN, Llama 3): that subgraph is evaluated once for positions 0 … context_length − 1, and the tables replace it. The
    kernel looks them up by `position_ids`, so positions need not start at 0 or follow the cache's slots.

    Left as RotaryEmbedding ahead of the attention, on [batch, sequence, heads · size] without transposes: head sizes that are
    no multiple of 16, tables that depend on anything else (M-RoPE's three axes), partial rotation.
    """

    name: ClassVar[str] = "fuse_rotary_embedding"

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        graph = model.graph
        tables: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value]] = {}
        for node in [n for n in graph if n.op_type == "GroupQueryAttention" and n.domain == MICROSOFT]:
            if attribute_int(node, "do_rotary", 0):
                continue
            rotations = [_rotation(node.inputs[0]), _rotation(node.inputs[1])]
            if rotations[0] is None or rotations[1] is None:
                continue
            reason = self._reason(node, rotations[0], rotations[1])
            if reason is None:
                key = (rotations[0].inputs[1], rotations[0].inputs[2])
                if key not in tables:
                    tables[key] = self._tables(graph, rotations[0])  # type: ignore[index]
                _fuse(graph, node, (rotations[0], rotations[1]), tables[key])  # type: ignore[index]
                changes.add("rotations fused", 2)
            else:
                changes.note(f"{node.name or node.outputs[0].name}: rotary embedding stays outside the attention: {reason}")
                for index, rotation in enumerate(rotations):
                    assert rotation is not None
                    if rank(rotation.inputs[0]) == 4 and _sequence_major(node, index, rotation):
                        changes.add("rotations without transposes")
        if changes:
            Cleanup().apply(model)  # the old rotations still read what CancelLayout is to cancel
            CancelLayout().apply(model)
            Cleanup().apply(model)
        return changes

    def _reason(self, node: ir.Node, query: ir.Node, key: ir.Node) -> str | None:
        """Why a pair of rotations cannot be fused, or None."""
        size = fixed_dim(node.inputs[3], 3)
        if size is None or size % _MULTIPLE:
            return f"head size {size} is no multiple of {_MULTIPLE}"
        if list(query.inputs[1:]) != list(key.inputs[1:]):
            return "query and key use different tables"
        if attribute_int(query, "interleaved", 0) != attribute_int(key, "interleaved", 0):
            return "query and key are laid out differently"
        half = fixed_dim(query.inputs[1], -1) or size // 2
        if attribute_int(query, "rotary_embedding_dim", 0) not in (0, size) or half != size // 2:
            return "only part of each head is rotated"
        positions = _positions(query)
        if positions is None:
            return "its tables depend on more than position_ids [batch, sequence]"
        return None

    def _tables(self, graph: ir.Graph, rotation: ir.Node) -> tuple[ir.Value, ir.Value]:
        """Cosine and sine [context_length, size / 2] as stored tensors."""
        cos, sin = rotation.inputs[1], rotation.inputs[2]
        assert cos is not None and sin is not None
        if len(rotation.inputs) > 3 and rotation.inputs[3] is not None:
            return cos, sin
        positions = np.arange(self.context_length, dtype=np.int64)[None]
        found = evaluate(graph, [cos, sin], {"position_ids": positions})
        count = sum(1 for name in graph.initializers if name.startswith("rotary.cos"))
        suffix = f".{count}" if count else ""
        return (
            add_initializer(graph, f"rotary.cos{suffix}", np.ascontiguousarray(found[0][0], np.float32)),
            add_initializer(graph, f"rotary.sin{suffix}", np.ascontiguousarray(found[1][0], np.float32)),
        )


def _rotation(value: ir.Value | None) -> ir.Node | None:
    """The RotaryEmbedding behind a query or key [batch, sequence, heads · size], past the merge of its heads."""
    if (direct := producer(value, "RotaryEmbedding")) is not None:
        return direct
    merge = producer(value, "Reshape")
    turn = producer(merge.inputs[0], "Transpose") if merge is not None else None
    return producer(turn.inputs[0], "RotaryEmbedding") if turn is not None else None


def _positions(rotation: ir.Node) -> ir.Value | None:
    """`position_ids` when the rotation's tables are a function of it alone, else None."""
    cos, sin = rotation.inputs[1], rotation.inputs[2]
    if cos is None or sin is None:
        return None
    if len(rotation.inputs) > 3 and rotation.inputs[3] is not None:  # stored tables, looked up by position
        positions = rotation.inputs[3]
        return positions if positions.is_graph_input() and rank(positions) == 2 and cos.const_value is not None else None
    needed = graph_inputs_of([cos, sin])
    if len(needed) != 1 or needed[0].name != "position_ids" or rank(needed[0]) != 2:
        return None
    return needed[0]


def _fuse(graph: ir.Graph, node: ir.Node, rotations: tuple[ir.Node, ir.Node], tables: tuple[ir.Value, ir.Value]) -> None:
    positions = _positions(rotations[0])
    interleaved = attribute_int(rotations[0], "interleaved", 0)
    for index, rotation in enumerate(rotations):
        node.replace_input_with(index, merge_heads(node, rotation.inputs[0]))
    node.resize_inputs(max(10, len(node.inputs)))
    for index, value in zip((7, 8, 9), (*tables, positions), strict=True):
        node.replace_input_with(index, value)
    node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
    node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", interleaved)


def _sequence_major(node: ir.Node, index: int, rotation: ir.Node) -> bool:
    """Runs an unfused rotation on [batch, sequence, heads · size]: two transposes less."""
    heads = fixed_dim(rotation.inputs[0], 1)
    if heads is None or len(rotation.outputs[0].uses()) != 1 or constant(rotation.inputs[1]) is not None:
        return False
    pattern = node.inputs[index]
    merged = merge_heads(node, rotation.inputs[0])
    attributes = {name: attribute for name, attribute in rotation.attributes.items() if name != "num_heads"}
    turned = insert(node, "RotaryEmbedding", [merged, *rotation.inputs[1:]], {**attributes, "num_heads": heads})
    assert pattern is not None and pattern.shape is not None
    node.replace_input_with(index, typed(turned.outputs[0], pattern.dtype, list(pattern.shape)))
    return True
