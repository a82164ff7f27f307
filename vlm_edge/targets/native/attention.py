"""Attention of a lowered decoder as steps: rotary positions and the cache, keys in place, static keys of cross-attention."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlm_edge.passes.attention_mask import mask_rule
from vlm_edge.passes.graph import attribute_float, attribute_int, fixed_dim, is_weight, producer, rank

from .angles import rotary_angles
from .builder import Context, Rows
from .errors import NotExpressible
from .panels import integers, vector
from .plan_file import Kind, Ref, Weight
from .probe import hides_where_zero
from .token_masks import SOURCE_MASK, TOKEN_MASK, MaskRule, mask_rule_of


def cross_attention(c: Context, node: ir.Node) -> None:
    """MultiHeadAttention over static keys and values, [batch, heads, source, size]."""
    inputs = [*node.inputs, *[None] * 10]
    if any(one is not None for one in (inputs[3], inputs[4], *inputs[6:])) or attribute_int(node, "unidirectional", 0):
        raise NotExpressible("attention over other than static keys and values")
    _cross(c, node, attribute_int(node, "num_heads", 0), inputs[5])


def static_attention(c: Context, node: ir.Node) -> None:
    """The standard operator over static keys and values: fewer key heads than query heads, soft-capping."""
    inputs = [*node.inputs, *[None] * 6]
    if any(one is not None for one in inputs[4:]) or attribute_int(node, "is_causal", 0):
        raise NotExpressible("attention over other than static keys and values")
    if any(out.uses() for out in node.outputs[1:]):
        raise NotExpressible("attention that gives its scores")
    four = rank(inputs[0]) == 4
    if four != (inputs[0] in c.by_head):
        raise NotExpressible("attention of queries that are not laid out by head")
    heads = (fixed_dim(inputs[0], 1) or 0) if four else attribute_int(node, "q_num_heads", 0)
    _cross(c, node, heads, inputs[3])
    if four:
        c.by_head.add(node.outputs[0])


def _cross(c: Context, node: ir.Node, heads: int, mask: ir.Value | None) -> None:
    query, key, value = c.made.rows(node.inputs[0]), node.inputs[1], node.inputs[2]
    names = [str(one.name) if one is not None else "" for one in (key, value)]
    if any(name not in c.further for name in names):
        raise NotExpressible("attention over other than static keys and values")
    size, kv_heads = fixed_dim(key, -1) or 0, fixed_dim(key, 1) or 0
    if not size or not kv_heads or heads % kv_heads or heads * size != query.width or fixed_dim(value, -1) != size:
        raise NotExpressible("cross-attention whose heads are not those of its keys")
    rule = _static_mask(c, mask) if mask is not None else MaskRule(padding=False, cells=False)
    out = c.made.floats(query.width)
    arguments = [c.further.index(names[0]), c.further.index(names[1]), heads, kv_heads, size]
    arguments += [c.further.index(SOURCE_MASK) if rule.padding else -1, c.further.index(TOKEN_MASK) if rule.cells else -1]
    arguments.append(int(rule.blind_sees_all))
    reals = [attribute_float(node, "scale", 0.0) or size**-0.5, attribute_float(node, "softcap", 0.0)]
    c.made.add(Kind.CROSS, query.width, query.last, [query.ref], [out], [], arguments, reals)
    c.made.define(node.outputs[0], out, query.width, query.last)


def _static_mask(c: Context, mask: ir.Value) -> MaskRule:
    if mask not in c.masks:
        if TOKEN_MASK in c.further:
            c.masks[mask] = mask_rule_of(c.model, mask)
        elif SOURCE_MASK in c.further and hides_where_zero(c.model, mask, SOURCE_MASK):
            c.masks[mask] = MaskRule(padding=True, cells=False)
        else:
            raise NotExpressible("a cross-attention mask that is not encoder_attention_mask's")
    return c.masks[mask]


def self_attention(c: Context, node: ir.Node) -> None:
    inputs = [*node.inputs, *[None] * 12]
    heads, kv_heads = attribute_int(node, "num_heads", 0), attribute_int(node, "kv_num_heads", 0)
    size, rule = fixed_dim(inputs[3], -1) or 0, mask_rule(node)
    if any(one is not None for one in inputs[11:]):
        raise NotExpressible("sinks or a quantised cache in GroupQueryAttention")
    if attribute_int(node, "smooth_softmax", 0) or len(node.outputs) > 3:
        raise NotExpressible("GroupQueryAttention with a smooth softmax or scores")
    cache = [c.caches.index(str(one.name)) for one in inputs[3:5] if one is not None]
    query, key, value, rotary, table = _rotated(c, node, inputs, heads, kv_heads, size)
    width = heads * size
    turned, out = c.made.floats(width), c.made.floats(width)
    last = query.last
    arguments = [*cache, heads, kv_heads, size]
    scale = attribute_float(node, "scale", 0.0) or size**-0.5
    refs = [query.ref, key.ref, value.ref, table if isinstance(table, Ref) else None]
    weights: list[Weight | None] = [*table] if isinstance(table, tuple) else []
    scales = c.scales_of(cache)
    c.made.add(Kind.ROTARY, width, last, refs, [turned], weights, [*arguments, *rotary, *scales], [scale])
    mutual = 0 if rule.kind != "blocks" else 2 if rule.windowed_blocks else 1
    window = attribute_int(node, "local_window_size", -1)
    numbers = [*arguments, max(window, 0), mutual, 0, *scales]
    reals = [0.0, attribute_float(node, "softcap", 0.0)]
    bias: list[Weight | None] = [] if inputs[10] is None else [_distance_bias(c, inputs[10], heads)]
    if bias and (mutual or reals[1]):
        raise NotExpressible("an attention bias with blocks or soft-capping")
    c.made.add(Kind.ATTENTION, width, last, [turned], [out], bias, numbers, reals)
    c.made.add(Kind.COMBINE, width, last, [turned], [out], [], numbers, reals)
    c.made.define(node.outputs[0], out, width, last)


def _distance_bias(c: Context, value: ir.Value, heads: int) -> Weight:
    """What is added by the distance to a key, as `position_bias.bias_of_rows` looks it up: [heads][distances], farthest first."""
    turned = producer(value, "Transpose")
    looked_up = producer(turned.inputs[0], "Gather") if turned is not None else None
    table = looked_up.inputs[0] if looked_up is not None else None
    inside = producer(looked_up.inputs[1], "Clip") if looked_up is not None else None
    tensor = table.const_value if is_weight(table) and table is not None else None
    if tensor is None or table is None or inside is None or len(tensor.shape) != 2 or tensor.shape[1] != heads:
        raise NotExpressible("an attention bias that is not one of distances")
    if table not in c.vectors:
        c.vectors[table] = vector(np.asarray(tensor.numpy(), np.float32)[::-1].T)
    return c.vectors[table]


def _rotated(
    c: Context, node: ir.Node, inputs: list[ir.Value | None], heads: int, kv_heads: int, size: int
) -> tuple[Rows, Rows, Rows, list[int], Ref | tuple[Weight, Weight] | None]:
    """(query, key, value, [rotary size, interleaved, source of angles], angles or tables of cosines and sines)."""
    if inputs[1] is None:
        packed = c.made.rows(inputs[0])
        at = [packed.ref.column + first * size for first in (0, heads, heads + kv_heads)]
        query, key, value = (Rows(Ref(packed.ref.buffer, column), 0, packed.last) for column in at)
    else:
        turned = [producer(one, "RotaryEmbedding") for one in inputs[:2]]
        if turned[0] is not None and turned[1] is not None:
            return _computed_angles(c, turned[0], turned[1], c.made.rows(inputs[2]), size)
        query, key, value = (c.made.rows(one) for one in inputs[:3])
    if not attribute_int(node, "do_rotary", 0):
        return query, key, value, [0, 0, 0], None
    cosine, sine = (_table(c, one) for one in inputs[7:9])
    given = inputs[9] is not None
    if given and inputs[9] is not c.inputs.get("position_ids"):
        raise NotExpressible("rotary positions that are not position_ids")
    return (
        query,
        key,
        value,
        [2 * cosine.width, attribute_int(node, "rotary_interleaved", 0), 1 if given else 2],
        (cosine, sine),
    )


def _table(c: Context, value: ir.Value | None) -> Weight:
    tensor = value.const_value if value is not None and is_weight(value) else None
    if tensor is None or value is None:
        raise NotExpressible("rotary tables that are not stored")
    if value not in c.vectors:
        c.vectors[value] = vector(np.asarray(tensor.numpy(), np.float32))
    return c.vectors[value]


def _computed_angles(
    c: Context, query: ir.Node, key: ir.Node, value: Rows, size: int
) -> tuple[Rows, Rows, Rows, list[int], Ref | tuple[Weight, Weight] | None]:
    cosine, sine = query.inputs[1:3]
    interleaved = attribute_int(query, "interleaved", 0)
    if (
        cosine is None
        or sine is None
        or list(key.inputs[1:3]) != [cosine, sine]
        or interleaved != attribute_int(key, "interleaved", 0)
    ):
        raise NotExpressible("queries and keys that turn by different angles")
    if len(query.inputs) > 3:
        stored = _table(c, cosine), _table(c, sine)
        if query.inputs[3] is not c.inputs.get("position_ids"):
            raise NotExpressible("rotary positions that are not position_ids")
        rows = [c.made.rows(one.inputs[0]) for one in (query, key)]
        return rows[0], rows[1], value, [2 * stored[0].width, interleaved, 1], stored
    if (cosine, sine) not in c.tables:
        positions = c.inputs["position_ids"]
        axes = fixed_dim(positions, 0) if positions.shape is not None and len(positions.shape) == 3 else 1
        angles = rotary_angles(c.model, cosine, sine, axes or 1)
        half = len(angles.frequencies)
        ref = c.made.floats(2 * half)
        weights: list[Weight | None] = [vector(angles.frequencies[None]), integers(angles.axes)]
        c.made.add(Kind.ANGLES, 2 * half, False, [], [ref], weights, [half], [angles.factor])
        c.tables[cosine, sine] = ref
    ref = c.tables[cosine, sine]
    rows = [c.made.rows(one.inputs[0]) for one in (query, key)]
    return rows[0], rows[1], value, [ref.buffer.width, interleaved, 3], ref
