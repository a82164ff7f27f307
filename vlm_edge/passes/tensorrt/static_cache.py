"""Attention with a growing past becomes attention over a cache of static capacity, as TensorRT wants it."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.attention_mask import MaskRule, Sizes, check_mask, mask_rule
from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.cleanup import Cleanup
from vlm_edge.passes.graph import (
    attribute_float,
    consumers,
    fixed_dim,
    insert,
    like,
    rank,
    remove_dead,
    substitute,
)
from vlm_edge.passes.heads import attention_heads, merge_heads, split_heads
from vlm_edge.passes.position_bias import distance_table
from vlm_edge_runtime.errors import TargetError

from .emit import Dim, Emit
from .explicit_mask import PAST_LENGTHS, StepMasks

Update = Literal["TensorScatter", "ScatterND"]
_PAST = "past_key_values."
_UPDATES = ("TensorScatter", "ScatterND")


class StaticCache(GraphPass):
    """Rewrites every ONNX `Attention` that has a past: new entries go into the cache, all of which is read under a mask.

    The signature changes: `attention_mask` and all that builds masks go; `past_lengths` int32 [batch] comes (valid entries of
    each row before this step, which is where its first new entry is written); past and present are
    [batch, kv_heads, capacity, head_dim]. Rows have no padding; what is written past the capacity is lost, which the caller must
    prevent (TensorRT drops it without a word).

    `update` is how entries are written. `TensorScatter` (opset 24, TensorRT ≥ 10.15) works in place when past and present are
    bound to one buffer; TensorRT demands that the cache be a graph input of static capacity. `ScatterND` gives a new tensor: bind
    past and present to two buffers and swap them.

    The masks are those of the metadata (causal, sliding window, blocks), checked against what the portable graph computes
    before anything is changed; a bias by distance (T5, ALiBi) is read off and added. Raises TargetError for any other mask, for
    attention that returns its scores, and when something besides attention reads the cache or the mask.
    """

    name: ClassVar[str] = "static_cache"

    def __init__(self, capacity: int, update: Update = "TensorScatter") -> None:
        self.capacity, self.update = capacity, update

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        graph = model.graph
        found = [node for node in graph if node.op_type == "Attention" and not node.domain and _has_past(node)]
        if not found:
            return changes
        tables = self._checked(graph, found)
        lengths = _add_input(graph)
        step = StepMasks(found[0], lengths, self.capacity)
        write = _Places(self.update, found, lengths, step)
        drawn = [_drawn(step, mask_rule(node), tables[node]) for node in found]  # before the first attention, which goes away
        for node, mask in zip(found, drawn, strict=True):
            self._lower(graph, node, mask, write)
            changes.add(f"caches by {self.update}", 2)
            changes.add("position biases", tables[node] is not None)
        Cleanup().apply(model)
        self._close(graph, changes)
        return changes

    def _checked(self, graph: ir.Graph, found: list[ir.Node]) -> dict[ir.Node, npt.NDArray[np.float32] | None]:
        """The bias by distance of each attention, None for none. Layers share masks: each is evaluated once."""
        known: dict[tuple[ir.Value | None, MaskRule, Sizes], npt.NDArray[np.float32] | None] = {}
        tables: dict[ir.Node, npt.NDArray[np.float32] | None] = {}
        for node in found:
            rule, sizes = mask_rule(node), _refuse(node)
            key = (node.inputs[3], rule, sizes)
            if key not in known:
                known[key] = self._table(graph, node, rule, sizes)
            tables[node] = known[key]
        return tables

    def _table(self, graph: ir.Graph, node: ir.Node, rule: MaskRule, sizes: Sizes) -> npt.NDArray[np.float32] | None:
        if rule.kind == "explicit":
            table = distance_table(graph, node, sizes, self.capacity)
            return table if table.any() else None
        if rule.kind not in ("causal", "blocks"):
            raise TargetError(
                f"Attention node {_label(node)} has a past and a {rule.kind} mask: a cache is read causally, or in blocks."
            )
        check_mask(graph, node, rule, sizes)
        return None

    def _lower(self, graph: ir.Graph, node: ir.Node, mask: ir.Value, write: _Places) -> None:
        query, key, value = node.inputs[:3]
        heads, kv_heads, head_dim = attention_heads(node)
        flat = rank(query) == 3
        assert query is not None and key is not None and value is not None
        size = fixed_dim(node.inputs[5], 3) or head_dim
        if flat:
            query, key = split_heads(node, query, heads, head_dim), split_heads(node, key, kv_heads, head_dim)
            value = split_heads(node, value, kv_heads, size)
        emit = Emit(node, node)
        caches: list[ir.Value] = []
        for past, new, old in zip(node.inputs[4:6], (key, value), node.outputs[1:3], strict=True):
            assert past is not None and past.shape is not None
            shape = [past.shape[0], kv_heads, self.capacity, past.shape[3]]
            if self.update == "TensorScatter":
                inputs = [past, new, write.first_slots]
                cache = emit("TensorScatter", inputs, past.dtype, shape, {"axis": 2, "mode": "linear"})
            else:
                cache = emit("ScatterND", [past, write.entries[kv_heads], new], past.dtype, shape)
            like(old, cache)
            substitute(old, cache)
            caches.append(cache)
        attributes: dict[str, int | float] = {"scale": attribute_float(node, "scale", 0.0) or head_dim**-0.5}
        if softcap := attribute_float(node, "softcap", 0.0):
            attributes["softcap"] = softcap
        made = insert(node, "Attention", [query, *caches, mask], attributes, name=node.name)
        made.metadata_props.update(node.metadata_props)
        result, out = made.outputs[0], node.outputs[0]
        assert query.shape is not None
        result.type, result.shape = query.type, ir.Shape([*query.shape[:3], size])
        substitute(out, merge_heads(node, result) if flat else result)
        remove_dead(graph, node)

    def _close(self, graph: ir.Graph, changes: Changes) -> None:
        """Takes the mask input out and fixes the cache's shapes. Raises TargetError if something still reads either."""
        for value in list(graph.inputs):
            if value.name == "attention_mask":
                if value.uses():
                    readers = ", ".join(f"{node.op_type} {_label(node)}" for node in consumers(value)[:3])
                    raise TargetError(f"attention_mask is read by more than the masks ({readers}): the graph cannot drop it.")
                graph.inputs.remove(value)
                changes.add("mask input removed")
            elif str(value.name).startswith(_PAST):
                others = [node for node in consumers(value) if node.op_type not in _UPDATES]
                if others:
                    raise TargetError(
                        f"{value.name} is read by {others[0].op_type} {_label(others[0])} besides its attention: in a cache of "
                        "static capacity its length means something else."
                    )
                self._resize(value)
        for value in graph.outputs:
            if str(value.name).startswith("present."):
                self._resize(value)

    def _resize(self, value: ir.Value) -> None:
        if value.shape is not None and len(value.shape) == 4:
            batch, heads, _, size = value.shape
            value.shape = ir.Shape([batch, heads, self.capacity, size])


class _Places:
    """Where new entries go, as either update wants to be told; nodes go in front of the first attention, once for all layers."""

    def __init__(self, update: Update, found: list[ir.Node], lengths: ir.Value, step: StepMasks) -> None:
        self._emit, self._step, int64 = Emit(found[0]), step, ir.DataType.INT64
        self.entries: dict[int, ir.Value] = {}
        """By number of KV heads: index of every new entry into the cache, int64 [batch, kv_heads, sequence, 3]."""
        self.first_slots: ir.Value | None = None
        """The slot of each row's first new entry, int64 [batch]."""
        if update == "TensorScatter":
            self.first_slots = self._emit("Cast", [lengths], int64, ["batch"], {"to": int(int64)})
        else:
            self.entries = {count: self._index(count) for count in sorted({attention_heads(node)[1] for node in found})}

    def _index(self, kv_heads: int) -> ir.Value:
        """What would lie behind the last slot goes there: an index out of bounds may write anywhere on a GPU."""
        emit, int64, positions = self._emit, ir.DataType.INT64, self._step.positions
        size = emit("Shape", [positions], int64, [2])
        rows, new = (emit("Slice", [size, emit.ints([a]), emit.ints([a + 1]), emit.ints([0])], int64, [1]) for a in (0, 1))
        whole = emit("Concat", [rows, emit.ints([kv_heads]), new, emit.ints([1])], int64, [4], {"axis": 0})
        count = emit("Squeeze", [rows, emit.ints([0])], int64, [])
        zero, one = emit.const("index.zero", 0, np.int64), emit.const("index.one", 1, np.int64)
        row = emit("Range", [zero, count, one], int64, ["batch"])
        row = emit("Unsqueeze", [row, emit.ints([1, 2, 3])], int64, ["batch", 1, 1, 1])
        head = emit.const(f"index.heads.{kv_heads}", np.arange(kv_heads).reshape(1, -1, 1, 1), np.int64)
        last = emit.const("last_slot", self._step.capacity - 1, np.int32)
        slot = emit("Min", [positions, last], ir.DataType.INT32, ["batch", "sequence"])
        slot = emit("Cast", [slot], int64, ["batch", "sequence"], {"to": int(int64)})
        slot = emit("Unsqueeze", [slot, emit.ints([1, 3])], int64, ["batch", 1, "sequence", 1])
        shape: list[Dim] = ["batch", kv_heads, "sequence", 1]
        parts = [emit("Expand", [part, whole], int64, shape) for part in (row, head, slot)]
        return emit("Concat", parts, int64, [*shape[:3], 3], {"axis": 3})


def _drawn(step: StepMasks, rule: MaskRule, table: npt.NDArray[np.float32] | None) -> ir.Value:
    if table is not None:
        return step.biased(table)
    return step.mask(MaskRule("causal") if rule.kind == "explicit" else rule)


def _has_past(node: ir.Node) -> bool:
    return len(node.inputs) > 5 and node.inputs[4] is not None and node.inputs[5] is not None


def _refuse(node: ir.Node) -> Sizes:
    """Raises TargetError for what the rewriting cannot carry over."""
    if len(node.outputs) > 3 and node.outputs[3].uses():
        raise TargetError(f"Attention node {_label(node)} also returns its scores; TensorRT's has one output.")
    if len(node.inputs) > 6 and node.inputs[6] is not None:
        raise TargetError(f"Attention node {_label(node)} has nonpad_kv_seqlen: it is not from a portable graph.")
    heads, kv_heads, head_dim = attention_heads(node)
    if heads % kv_heads:
        raise TargetError(f"Attention node {_label(node)}: {heads} query heads are not a multiple of {kv_heads} KV heads.")
    return Sizes(kv_heads, head_dim)


def _add_input(graph: ir.Graph) -> ir.Value:
    value = ir.Value(name=PAST_LENGTHS, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(["batch"]))
    graph.inputs.insert(next(index for index, other in enumerate(graph.inputs) if str(other.name).startswith(_PAST)), value)
    return value


def _label(node: ir.Node) -> str:
    return repr(node.name or node.outputs[0].name)
