"""`Attention` written out as matrix products and a softmax."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import attribute_float, attribute_int, fixed_dim, rank, remove_dead, substitute
from vlm_edge.passes.heads import merge_heads, split_heads
from vlm_edge_runtime.errors import TargetError

from .emit import LOWEST, Dim, Emit


class DecomposeAttention(GraphPass):
    """softmax(soft-cap(scale · Q Kᵀ) + mask) V, for every ONNX `Attention` without a past (StaticCache takes that out).

    For TensorRT without an import of `Attention` (before 10.14), and with `softcap_only` for the one attribute that TensorRT's
    import refuses everywhere: soft-capped scores (Gemma 2, arXiv 2408.00118, section 2). The cap comes before the mask, as in
    ONNX Runtime and in the models.

    Grouped queries (arXiv 2305.13245) are not met by copying keys and values: the G query heads of one KV head stand behind each
    other on the query axis, [batch, kv_heads, G · sequence, size]. What the softmax reads and gives is marked for fp32. A row of
    a bool mask that sees nothing becomes the mean of all values, not NaN.
    """

    name: ClassVar[str] = "decompose_attention"

    def __init__(self, *, softcap_only: bool = False) -> None:
        self.softcap_only = softcap_only

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        for node in list(model.graph):
            if node.op_type != "Attention" or node.domain:
                continue
            if self.softcap_only and not attribute_float(node, "softcap", 0.0):
                continue
            _decompose(model.graph, node)
            changes.add("attention written out")
        return changes


def _decompose(graph: ir.Graph, node: ir.Node) -> None:
    label = repr(node.name or node.outputs[0].name)
    if any(value is not None for value in node.inputs[4:]) or any(
        out.uses() or out.is_graph_output() for out in node.outputs[1:]
    ):
        raise TargetError(
            f"Attention node {label} has a cache of its own or gives its scores: it cannot be written out as it is."
        )
    query, key, value = node.inputs[:3]
    if query is None or key is None or value is None:
        raise TargetError(f"Attention node {label} lacks its query, key or value.")
    flat = rank(query) == 3
    if flat:
        heads, kv_heads = attribute_int(node, "q_num_heads", 0), attribute_int(node, "kv_num_heads", 0)
        widths = [fixed_dim(part, 2) for part in (query, key, value)]
        if not heads or not kv_heads or None in widths:
            raise TargetError(f"Attention node {label}: the number of heads and their size must be fixed numbers.")
        query = split_heads(node, query, heads, (widths[0] or 0) // heads)
        key, value = (
            split_heads(node, part, kv_heads, (width or 0) // kv_heads) for part, width in ((key, widths[1]), (value, widths[2]))
        )
    heads, kv_heads, size = fixed_dim(query, 1) or 0, fixed_dim(key, 1) or 0, fixed_dim(query, 3) or 0
    if not heads or not kv_heads or not size or heads % kv_heads:
        raise TargetError(f"Attention node {label}: {heads} query heads, {kv_heads} KV heads, size {size} cannot be written out.")
    result = _written_out(Emit(node, node), node, (query, key, value), (heads, kv_heads, size))
    substitute(node.outputs[0], merge_heads(node, result) if flat else result)
    remove_dead(graph, node)


def _written_out(emit: Emit, node: ir.Node, parts: tuple[ir.Value, ir.Value, ir.Value], sizes: tuple[int, int, int]) -> ir.Value:
    query, key, value = parts
    heads, kv_heads, size = sizes
    assert query.shape is not None and key.shape is not None and value.shape is not None
    dtype, batch, new, keys = query.dtype, query.shape[0], query.shape[2], key.shape[2]
    grouped = heads != kv_heads
    scale = attribute_float(node, "scale", 0.0) or size**-0.5
    query = emit("Mul", [query, emit.const(f"scale.{scale!r}", scale, np.float32)], dtype, [batch, heads, new, size])
    if grouped:
        query = emit("Reshape", [query, emit.ints([0, kv_heads, -1, size])], dtype, [batch, kv_heads, None, size])
    turned = emit("Transpose", [key], dtype, [batch, kv_heads, size, keys], {"perm": [0, 1, 3, 2]})
    whole: list[Dim] = [batch, heads, new, keys]
    scores = emit("MatMul", [query, turned], dtype, [batch, kv_heads, None, keys] if grouped else whole)
    if grouped:
        scores = emit("Reshape", [scores, emit.ints([0, heads, -1, 0])], dtype, whole)
    if cap := attribute_float(node, "softcap", 0.0):
        limit = emit.const(f"softcap.{cap!r}", cap, np.float32)
        scores = emit("Tanh", [emit("Div", [scores, limit], dtype, whole, full=True)], dtype, whole, full=True)
        scores = emit("Mul", [scores, limit], dtype, whole, full=True)
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if attribute_int(node, "is_causal", 0):
        scores = _hidden(emit, _causal(emit, query if not grouped else parts[0], key), scores, whole)
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        scores = _hidden(emit, mask, scores, whole)
    elif mask is not None:
        scores = emit("Add", [scores, mask], dtype, whole, full=True)
    weights = emit("Softmax", [scores], dtype, whole, {"axis": -1}, full=True)
    out: list[Dim] = [batch, heads, new, value.shape[3]]
    if not grouped:
        return emit("MatMul", [weights, value], dtype, out)
    weights = emit("Reshape", [weights, emit.ints([0, kv_heads, -1, 0])], dtype, [batch, kv_heads, None, keys])
    result = emit("MatMul", [weights, value], dtype, [batch, kv_heads, None, value.shape[3]])
    return emit("Reshape", [result, emit.ints([0, heads, -1, 0])], dtype, out)


def _hidden(emit: Emit, mask: ir.Value, scores: ir.Value, shape: list[Dim]) -> ir.Value:
    lowest = emit.const("lowest", LOWEST, np.float32)
    return emit("Where", [mask, scores, lowest], scores.dtype, shape, full=True)


def _causal(emit: Emit, query: ir.Value, key: ir.Value) -> ir.Value:
    """bool [queries, keys], query i sees keys up to i (as `is_causal` means it)."""
    int64 = ir.DataType.INT64
    zero, one = emit.const("index.zero", 0, np.int64), emit.const("index.one", 1, np.int64)
    assert query.shape is not None and key.shape is not None
    ranges: list[ir.Value] = []
    for value, axis in ((query, 1), (key, 0)):
        dim = (query if value is query else key).shape
        length = emit("Shape", [value], int64, [1], {"start": 2, "end": 3})
        count = emit("Squeeze", [length, emit.ints([0])], int64, [])
        size = dim[2] if dim is not None else None
        places = emit("Range", [zero, count, one], int64, [size])
        ranges.append(emit("Unsqueeze", [places, emit.ints([axis])], int64, [size, 1] if axis else [1, size]))
    return emit("LessOrEqual", [ranges[1], ranges[0]], ir.DataType.BOOL, [query.shape[2], key.shape[2]])
