"""Attention biases that depend on the distance from query to key (T5, ALiBi): found by running the mask, rebuilt per row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge_runtime.errors import TargetError

from .attention_mask import SEEN, Sizes, evaluate_mask
from .graph import add_initializer, insert, typed

_LONGEST_CHECK = 24


def distance_table(graph: ir.Graph, attention: ir.Node, sizes: Sizes, context_length: int) -> npt.NDArray[np.float32]:
    """What an additive causal mask adds for each distance 0, 1, … from a query back to a key: float32 [context_length, heads].

    T5 (arXiv 1910.10683, section 2.1) learns a bias per head and bucket of distances; ALiBi (2108.12409) adds a slope times
    the distance, which some models write as a slope times the key's place: the same up to a number per query, which softmax does
    not see. Raises TargetError for a mask that is not causal or depends on more than the distance.
    """
    mask, label = attention.inputs[3], attention.name or attention.outputs[0].name
    if mask is None or mask.dtype != ir.DataType.FLOAT:
        raise TargetError(
            f"Attention node {label!r} has an explicit mask that is not additive: the fused kernel has no place for it."
        )
    newest = _rows(evaluate_mask(graph, mask, 1, context_length - 1, sizes))
    table = np.ascontiguousarray(newest[:, 0, ::-1].T, np.float32)  # [distance, heads]
    if not (table > SEEN).all():
        raise TargetError(f"Attention node {label!r} has an explicit mask that hides keys before the query: it is not causal.")
    for queries, past in ((5, 0), (1, 3), (3, 6), (_LONGEST_CHECK, 0), (2, min(context_length - 2, 150))):
        found = _rows(evaluate_mask(graph, mask, queries, past, sizes))
        distance = (np.arange(queries) + past)[:, None] - np.arange(past + queries)[None, :]
        wanted = table[np.clip(distance, 0, None)].transpose(2, 0, 1)
        seen = distance >= 0
        if not np.array_equal(found > SEEN, np.broadcast_to(seen, found.shape)):
            raise TargetError(f"Attention node {label!r} has an explicit mask that is not causal: the fused kernel is.")
        apart = np.where(seen, found - wanted, 0)
        # A number per query is allowed: its newest key (distance 0) says which.
        apart -= np.where(seen, np.take_along_axis(apart, np.argmin(np.where(seen, distance, 1 << 30), -1)[None, :, None], -1), 0)
        if np.abs(apart).max(initial=0.0) > 1e-5 * max(1.0, float(np.abs(table).max())):
            raise TargetError(f"Attention node {label!r} has a mask that depends on more than the distance from query to key.")
    return table


def bias_of_rows(
    graph: ir.Graph, before: ir.Node, table: npt.NDArray[np.float32], lengths: ir.Value, total: ir.Value
) -> ir.Value:
    """Nodes that look the bias up for a shared KV buffer: float32 [batch, heads, sequence, total].

    In the buffer each row begins at slot 0, so that rows of one step have their queries at different slots: row b's query s
    stands at `lengths[b] + 1 − sequence + s` (`lengths`: the valid length after the step, minus one).
    """
    i64, name = ir.DataType.INT64, "position_bias"
    embeds = next(value for value in graph.inputs if value.name == "inputs_embeds")

    def node(op: str, inputs: list[ir.Value], shape: list[int | str], attributes: dict[str, int] | None = None) -> ir.Value:
        return typed(insert(before, op, inputs, attributes).outputs[0], i64, shape)

    def const(key: str, value: object) -> ir.Value:
        return add_initializer(graph, f"{name}.{key}", np.array(value, np.int64))

    zero, one = const("zero", 0), const("one", 1)
    sequence = node("Squeeze", [node("Shape", [embeds], [1], {"start": 1, "end": 2})], [])
    last = node("Cast", [lengths], ["batch"], {"to": int(i64)})
    first = node("Sub", [node("Add", [last, one], ["batch"]), sequence], ["batch"])
    first = node("Unsqueeze", [first, const("column", [1])], ["batch", 1])
    queries = node("Add", [first, node("Range", [zero, sequence, one], ["sequence"])], ["batch", "sequence"])
    queries = node("Unsqueeze", [queries, const("keys", [2])], ["batch", "sequence", 1])
    length = node("Squeeze", [node("Cast", [total], [1], {"to": int(i64)})], [])
    distance = node("Sub", [queries, node("Range", [zero, length, one], ["total"])], ["batch", "sequence", "total"])
    inside = node("Clip", [distance, zero, const("longest", len(table) - 1)], ["batch", "sequence", "total"])
    rows = insert(before, "Gather", [add_initializer(graph, f"{name}.table", table), inside], {"axis": 0}).outputs[0]
    typed(rows, ir.DataType.FLOAT, ["batch", "sequence", "total", table.shape[1]])
    turned = insert(before, "Transpose", [rows], {"perm": [0, 3, 1, 2]}).outputs[0]
    return typed(turned, ir.DataType.FLOAT, ["batch", table.shape[1], "sequence", "total"])


def _rows(mask: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """[1, heads, queries, keys] → [heads, queries, keys]."""
    return np.asarray(mask, np.float32).reshape(mask.shape[-3:])
