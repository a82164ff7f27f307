"""Attention masks of a decoder on a static cache, computed in the graph from the number of valid entries of each row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.attention_mask import BLOCK_IDS, MaskRule
from vlm_edge_runtime.errors import TargetError

from .emit import LOWEST, Dim, Emit

PAST_LENGTHS = "past_lengths"


class StepMasks:
    """Which of a cache's slots each new token may see.

    Row b has `past_lengths[b]` valid entries from slot 0 on, and its new token s is written to slot `past_lengths[b] + s`; so a
    causal token sees the slots up to its own, which also hides what is not written yet. No row has padding. All comparisons are
    of int32. The nodes go in front of `before`, and what several masks share is computed once. Masks are compared in their four
    dimensions from the start: TensorRT-RTX 1.7.1 does not compile one that gets its second dimension afterwards, for one row
    of several tokens ("Graph contains more than one op named").
    """

    def __init__(self, before: ir.Node, past_lengths: ir.Value, capacity: int) -> None:
        self._emit = emit = Emit(before)
        self.capacity, self._past = capacity, past_lengths
        self._masks: dict[MaskRule, ir.Value] = {}
        self._biases: dict[bytes, ir.Value] = {}
        int32, one = ir.DataType.INT32, ir.DataType.INT64
        embeds = next((value for value in emit.graph.inputs if value.name == "inputs_embeds"), None)
        if embeds is None:
            raise TargetError("the decoder has no input 'inputs_embeds' to read the number of new tokens from.")
        self.slots = emit.const("slots", np.arange(capacity), np.int32)
        self.length = emit("Shape", [embeds], one, [1], {"start": 1, "end": 2})
        new = emit("Slice", [self.slots, emit.ints([0]), self.length, emit.ints([0])], int32, ["sequence"])
        first = emit("Unsqueeze", [past_lengths, emit.ints([1])], int32, ["batch", 1])
        self.positions = emit("Add", [first, new], int32, ["batch", "sequence"])
        """The slot of each new token, int32 [batch, sequence]."""
        self._first = first
        self._query = emit("Unsqueeze", [self.positions, emit.ints([1, 3])], int32, ["batch", 1, "sequence", 1])
        self._seen = self._flag("LessOrEqual", self.slots, self._query)

    def mask(self, rule: MaskRule) -> ir.Value:
        """bool [batch, 1, sequence, capacity]; True where a token may see a slot."""
        if rule not in self._masks:
            self._masks[rule] = self._flags(rule)
        return self._masks[rule]

    def biased(self, table: npt.NDArray[np.float32]) -> ir.Value:
        """Additive mask float32 [batch, heads, sequence, capacity] of a causal attention with a bias by distance.

        `table` float32 [distances, heads]; a distance beyond the table has that of its last row.
        """
        key = table.tobytes()
        if key not in self._biases:
            emit, (longest, heads) = self._emit, table.shape
            int32, real = ir.DataType.INT32, ir.DataType.FLOAT
            space: list[Dim] = ["batch", "sequence", self.capacity]
            query = emit("Unsqueeze", [self.positions, emit.ints([2])], int32, ["batch", "sequence", 1])
            distance = emit("Sub", [query, self.slots], int32, space)
            distance = emit("Max", [distance, emit.const("zero", 0, np.int32)], int32, space)
            distance = emit("Min", [distance, emit.const("longest", longest - 1, np.int32)], int32, space)
            stored = emit.const("position_bias", table, np.float32)
            rows = emit("Gather", [stored, distance], real, [*space, heads], {"axis": 0})
            shape: list[Dim] = ["batch", heads, "sequence", self.capacity]
            bias = emit("Transpose", [rows], real, shape, {"perm": [0, 3, 1, 2]})
            causal = self.mask(MaskRule("causal"))
            self._biases[key] = emit("Where", [causal, bias, emit.const("lowest", LOWEST, np.float32)], real, shape)
        return self._biases[key]

    def _flag(self, op: str, left: ir.Value, right: ir.Value) -> ir.Value:
        return self._emit(op, [left, right], ir.DataType.BOOL, ["batch", 1, "sequence", self.capacity])

    def _flags(self, rule: MaskRule) -> ir.Value:
        emit, near = self._emit, None
        if rule.window is not None:
            width = emit.const(f"window.{rule.window}", rule.window, np.int32)
            edge = emit("Sub", [self._query, width], ir.DataType.INT32, ["batch", 1, "sequence", 1])
            near = self._flag("Greater", self.slots, edge)
        if rule.kind == "causal":
            return self._seen if near is None else self._flag("And", self._seen, near)
        if rule.kind != "blocks":
            raise TargetError(f"a mask of kind '{rule.kind}' cannot be computed from the lengths of the rows.")
        seen = self._seen if near is None or rule.windowed_blocks else self._flag("And", self._seen, near)
        seen = self._flag("Or", seen, self._same_block())
        return self._flag("And", seen, near) if near is not None and rule.windowed_blocks else seen

    def _same_block(self) -> ir.Value:
        """Whether a token and a slot are both new and of one block; the blocks of earlier calls are only seen causally."""
        emit, int32, flag = self._emit, ir.DataType.INT32, ir.DataType.BOOL
        ids = next((value for value in emit.graph.inputs if value.name == BLOCK_IDS), None)
        if ids is None:
            raise TargetError(f"the decoder's masks have blocks, but it has no input '{BLOCK_IDS}' that numbers them.")
        of_query = emit("Cast", [ids], int32, ["batch", "sequence"], {"to": int(int32)})
        zero = emit.const("zero", 0, np.int32)
        row: list[Dim] = ["batch", self.capacity]
        offset = emit("Sub", [self.slots, self._first], int32, row)
        length = emit("Cast", [self.length], int32, [1], {"to": int(int32)})
        last = emit("Sub", [length, emit.const("one", 1, np.int32)], int32, [1])
        inside = emit("Min", [emit("Max", [offset, zero], int32, row), last], int32, row)
        found = emit("GatherElements", [of_query, inside], int32, row, {"axis": 1})
        is_new = emit("Equal", [inside, offset], flag, row)
        of_slot = emit("Where", [is_new, found, zero], int32, row)
        flat: list[Dim] = ["batch", 1, 1, self.capacity]
        in_block = emit("Unsqueeze", [emit("Greater", [of_slot, zero], flag, row), emit.ints([1, 2])], flag, flat)
        left = emit("Unsqueeze", [of_query, emit.ints([1, 3])], int32, ["batch", 1, "sequence", 1])
        right = emit("Unsqueeze", [of_slot, emit.ints([1, 2])], int32, flat)
        return self._flag("And", self._flag("Equal", left, right), in_block)
