"""Attention with a growing past becomes GroupQueryAttention on one shared, in-place KV buffer."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge_runtime.errors import TargetError

from .attention_mask import Sizes, check_mask, mask_rule
from .base import Changes, GraphPass
from .cleanup import Cleanup
from .graph import (
    MICROSOFT,
    attribute_float,
    consumers,
    fixed_dim,
    insert,
    like,
    rank,
    remove_dead,
    substitute,
)
from .heads import attention_heads, merge_heads, split_heads
from .layout import CancelLayout
from .position_bias import bias_of_rows, distance_table

CAPACITY = "capacity"
_PAST = "past_key_values."


class LowerToGroupQueryAttention(GraphPass):
    """Rewrites every ONNX `Attention` that has a past into com.microsoft `GroupQueryAttention`.

    Why: the standard operator concatenates past and new keys each step (a copy of the whole cache per token), and ONNX
    Runtime's kernel for it reads the full capacity. GroupQueryAttention writes the new entries in place when past and
    present are bound to one buffer, reads only the valid part, and needs no mask tensor.

    The graph's signature changes: `attention_mask` and all that builds masks go; `seqlens_k` int32 [batch] (valid length
    after this step, minus one, per row) and `total_sequence_length` int32 [1] (largest valid length after this step)
    come; past and present are [batch, kv_heads, capacity, head_dim]. Rows have no padding inside. ONNX Runtime's kernel takes
    more than one new token after a past at batch 1 only.

    Sliding windows (`vlm_edge.sliding_window`), soft-capping and the scale are carried over; every mask is evaluated first.
    A causal mask with a bias by distance (T5, ALiBi) becomes the operator's attention bias. A mask with blocks (tokens that see
    each other both ways) is lowered to its causal part, and the metadata stays: `BlockAttention` must run afterwards. Raises
    TargetError for other masks, for a padding-free contract that does not hold (something else reads the past), and for
    attention that returns its scores.
    """

    name: ClassVar[str] = "group_query_attention"

    def __init__(self, context_length: int = 512) -> None:
        self.context_length = context_length

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        graph = model.graph
        found = [node for node in graph if node.op_type == "Attention" and not node.domain and _has_past(node)]
        if not found:
            return changes
        tables = {node: self._table(graph, node) for node in found}
        lengths = _add_input(graph, "seqlens_k", ir.DataType.INT32, ["batch"])
        total = _add_input(graph, "total_sequence_length", ir.DataType.INT32, [1])
        model.graph.opset_imports[MICROSOFT] = 1
        biases: dict[bytes, ir.Value] = {}
        for node in found:
            table, bias = tables[node], None
            if table is not None:
                if (key := table.tobytes()) not in biases:
                    biases[key] = bias_of_rows(graph, found[0], table, lengths, total)
                bias = biases[key]
                changes.add("biases by distance")
            _lower(graph, node, lengths, total, bias)
            changes.add("Attention → GroupQueryAttention")
        CancelLayout().apply(model)
        Cleanup().apply(model)
        _close(graph, changes)
        return changes

    def _table(self, graph: ir.Graph, node: ir.Node) -> npt.NDArray[np.float32] | None:
        """The bias by distance that a node's mask holds, None for none. Raises TargetError for what cannot be lowered."""
        sizes = _refuse(node)
        rule = mask_rule(node)
        if rule.kind == "explicit":
            table = distance_table(graph, node, sizes, self.context_length)
            return table if table.any() else None
        check_mask(graph, node, rule, sizes)
        return None


def _has_past(node: ir.Node) -> bool:
    return len(node.inputs) > 5 and node.inputs[4] is not None and node.inputs[5] is not None


def _refuse(node: ir.Node) -> Sizes:
    """Raises TargetError for what the fused operator cannot do."""
    kind = mask_rule(node).kind
    label = node.name or str(node.outputs[0].name)
    if kind not in ("causal", "blocks", "explicit"):
        raise TargetError(f"Attention node {label!r} has a {kind} mask: GroupQueryAttention on ONNX Runtime is causal only.")
    if len(node.outputs) > 3 and node.outputs[3].uses():
        raise TargetError(f"Attention node {label!r} also returns its scores; the fused kernel has none to give.")
    if len(node.inputs) > 6 and node.inputs[6] is not None:
        raise TargetError(f"Attention node {label!r} has nonpad_kv_seqlen: it is not from a portable graph.")
    heads, kv_heads, head_dim = attention_heads(node)
    if fixed_dim(node.inputs[5], 3) not in (head_dim, None):
        raise TargetError(f"Attention node {label!r} has values of another size than keys: the fused kernel needs one size.")
    if heads % kv_heads:
        raise TargetError(f"Attention node {label!r}: {heads} query heads are not a multiple of {kv_heads} KV heads.")
    return Sizes(kv_heads, head_dim)


def _lower(graph: ir.Graph, node: ir.Node, lengths: ir.Value, total: ir.Value, bias: ir.Value | None) -> None:
    heads, kv_heads, head_dim = attention_heads(node)
    query, key, value = (merge_heads(node, source) for source in node.inputs[:3])
    attributes: dict[str, int | float] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": attribute_float(node, "scale", head_dim**-0.5) or head_dim**-0.5,
        "do_rotary": 0,
    }
    if softcap := attribute_float(node, "softcap", 0.0):
        attributes["softcap"] = softcap
    if (window := mask_rule(node).window) is not None:
        attributes["local_window_size"] = window
    more: list[ir.Value | None] = [] if bias is None else [None, None, None, bias]
    fused = insert(
        node,
        "GroupQueryAttention",
        [query, key, value, node.inputs[4], node.inputs[5], lengths, total, *more],
        attributes,
        domain=MICROSOFT,
        outputs=3,
        name=node.name,
    )
    fused.metadata_props.update(node.metadata_props)
    out = fused.outputs[0]
    like(out, query)
    for old, new in zip(node.outputs[1:3], fused.outputs[1:3], strict=False):
        like(new, old)
        substitute(old, new)
    result = node.outputs[0]
    substitute(result, split_heads(node, out, heads, head_dim) if rank(node.inputs[0]) == 4 else out)
    remove_dead(graph, node)


def _add_input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    graph.inputs.insert(next((i for i, v in enumerate(graph.inputs) if str(v.name).startswith(_PAST)), len(graph.inputs)), value)
    return value


def _close(graph: ir.Graph, changes: Changes) -> None:
    """Takes the mask input out and fixes the cache's shapes. Raises TargetError if something still reads either."""
    for value in list(graph.inputs):
        if value.name == "attention_mask":
            if value.uses():
                readers = ", ".join(f"{node.op_type} {node.name or node.outputs[0].name}" for node in consumers(value)[:3])
                raise TargetError(f"attention_mask is read by more than the masks ({readers}): the graph cannot drop it.")
            graph.inputs.remove(value)
            changes.add("mask input removed")
        elif str(value.name).startswith(_PAST):
            others = [node for node in consumers(value) if node.op_type != "GroupQueryAttention"]
            if others:
                raise TargetError(
                    f"{value.name} is read by {others[0].op_type} {others[0].name or others[0].outputs[0].name} besides its "
                    "attention: with a buffer of fixed capacity its length means something else."
                )
            _with_capacity(value)
    for value in graph.outputs:
        if str(value.name).startswith("present."):
            _with_capacity(value)


def _with_capacity(value: ir.Value) -> None:
    if value.shape is not None and len(value.shape) == 4:
        batch, heads, _, size = value.shape
        value.shape = ir.Shape([batch, heads, CAPACITY, size])
