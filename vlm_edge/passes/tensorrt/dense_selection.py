"""Rows chosen by their content (NonZero) are computed for all rows and chosen afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.cleanup import Cleanup
from vlm_edge.passes.graph import attribute_int, attribute_ints, constant, fixed_dim, producer, rank, substitute
from vlm_edge_runtime.errors import TargetError

from .emit import Dim, Emit

_ROWWISE = ("Add", "Sub", "Mul")


class DenseSelection(GraphPass):
    """`ScatterND(all, where, f(GatherND(x, where)))` with `where = NonZero(mask)` → `Where(mask, f(x), all)`.

    How many rows NonZero finds is known only when it ran: TensorRT would need an output of unknown size in the midst of the
    graph, no CUDA graph could hold it, and TensorRT-RTX does not import it. f may look rows up in a table (the indices of rows
    that are not chosen become 0) and do arithmetic with constants: what a second embedding table for added tokens needs
    (IDEFICS). Raises TargetError for any other use.
    """

    name: ClassVar[str] = "dense_selection"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        graph = model.graph
        if not any(node.op_type == "NonZero" and not node.domain for node in graph):
            return changes
        for node in list(graph):
            if node.op_type != "ScatterND" or node.domain or node.graph is None:
                continue
            mask = _mask_of(node.inputs[1])
            updates = node.inputs[2]
            if mask is None or updates is None:
                continue
            out, emit = node.outputs[0], Emit(node, node)
            rows = _dense(emit, updates, mask)
            whole = list(out.shape) if out.shape is not None else []
            flag, depth = mask, len(whole) - (rank(mask) or 0)
            if depth:
                axes = list(range(len(whole) - depth, len(whole)))
                flag = emit("Unsqueeze", [mask, emit.ints(axes)], ir.DataType.BOOL, [*whole[:-depth], *[1] * depth])
            substitute(out, emit("Where", [flag, rows, node.inputs[0]], out.dtype, whole))
            changes.add("selections")
        Cleanup().apply(model)
        left = next((node for node in graph if node.op_type == "NonZero" and not node.domain), None)
        if left is not None:
            raise TargetError(
                f"NonZero {left.name or left.outputs[0].name!r} chooses rows by their content in a way that cannot be computed "
                "for all rows: a compiled engine needs sizes that are known beforehand."
            )
        return changes


def _mask_of(value: ir.Value | None) -> ir.Value | None:
    """The bool mask whose coordinates [found, axes] `value` holds: NonZero turned, as it is or put together column by column."""
    turned = producer(value, "Transpose")
    if turned is not None and attribute_ints(turned, "perm") == (1, 0):
        found = producer(turned.inputs[0], "NonZero")
        mask = found.inputs[0] if found is not None else None
        return mask if mask is not None and mask.dtype == ir.DataType.BOOL else None
    joined = producer(value, "Concat")
    if joined is None or attribute_int(joined, "axis", 0) not in (-1, 1):
        return None
    masks = [_column(part, number) for number, part in enumerate(joined.inputs)]
    return masks[0] if masks[0] is not None and all(mask is masks[0] for mask in masks) else None


def _column(value: ir.Value | None, number: int) -> ir.Value | None:
    """The mask of which `value` is column `number` of the coordinates, as [found, 1]."""
    lifted = producer(value, "Unsqueeze")
    flat = producer(lifted.inputs[0], "Squeeze") if lifted is not None else None
    cut = producer(flat.inputs[0], "Slice") if flat is not None else None
    if cut is None:
        return None
    bounds = [constant(given) for given in cut.inputs[1:4]]
    if [None if given is None else given.reshape(-1).tolist() for given in bounds] != [[number], [number + 1], [1]]:
        return None
    return _mask_of(cut.inputs[0])


def _dense(emit: Emit, value: ir.Value, mask: ir.Value) -> ir.Value:
    """What `value` [found, …] would hold for every row, chosen or not; a stored number stays one number."""
    stored = constant(value)
    if stored is not None and stored.size == 1:
        return emit.const(f"{value.name}.row", stored.reshape(()), stored.dtype)
    node = value.producer()
    if node is not None and not node.domain:
        if node.op_type == "GatherND" and _mask_of(node.inputs[1]) is mask and node.inputs[0] is not None:
            return node.inputs[0]
        if node.op_type == "Expand" and (filler := constant(node.inputs[0])) is not None and filler.size == 1:
            return emit.const(f"{value.name}.row", filler.reshape(()), filler.dtype)
        if node.op_type in _ROWWISE and any(constant(source) is not None for source in node.inputs):
            sources = [_dense(emit, source, mask) for source in node.inputs if source is not None]
            return emit(node.op_type, sources, value.dtype, _shape(mask, value))
        if node.op_type == "Gather" and not attribute_int(node, "axis", 0) and node.inputs[1] is not None:
            rows = _dense(emit, node.inputs[1], mask)
            zero = emit.const("index.zero", 0, np.int64)
            safe = emit("Where", [mask, rows, zero], ir.DataType.INT64, _shape(mask, node.inputs[1]))
            return emit("Gather", [node.inputs[0], safe], value.dtype, _shape(mask, value), {"axis": 0})
    what = f"{node.op_type} {node.name or value.name!r}" if node is not None else f"'{value.name}'"
    raise TargetError(f"{what} works on rows that NonZero chose, and is not known to treat each row by itself.")


def _shape(mask: ir.Value, value: ir.Value) -> Sequence[Dim]:
    """The mask's shape in the place of the number of rows found."""
    whole: list[Dim] = list(mask.shape) if mask.shape is not None else []
    return [*whole, *(fixed_dim(value, axis) for axis in range(1, rank(value) or 1))]
