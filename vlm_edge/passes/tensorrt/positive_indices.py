"""Constant negative indices of Gather become positive ones."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import attribute_int, constant, fixed_dim, like, remove_dead, substitute
from vlm_edge_runtime.errors import TargetError

from .emit import Emit

_END = np.iinfo(np.int64).max


class PositiveIndices(GraphPass):
    """TensorRT's Gather takes its indices as they come, while ONNX counts negative ones from the end.

    An index into an axis of fixed size becomes a positive number; one row from the end of a dynamic axis (the last token)
    becomes a Slice, whose import does count from the end.
    """

    name: ClassVar[str] = "positive_indices"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        for node in list(model.graph):
            indices = constant(node.inputs[1]) if node.op_type == "Gather" and not node.domain else None
            if indices is None or not (indices < 0).any():
                continue
            axis = attribute_int(node, "axis", 0)
            size, emit = fixed_dim(node.inputs[0], axis), Emit(node, node)
            if size is not None:
                positive = np.where(indices < 0, indices + size, indices).astype(np.int64)
                node.replace_input_with(1, emit.const(f"{node.outputs[0].name}.indices", positive, np.int64))
                changes.add("indices")
                continue
            if indices.size != 1:
                raise TargetError(
                    f"Gather {node.name or node.outputs[0].name!r} takes several indices from the end of an axis of unknown size."
                )
            start, out = int(indices.reshape(-1)[0]), node.outputs[0]
            bounds = [emit.ints([start]), emit.ints([start + 1 if start < -1 else _END]), emit.ints([axis])]
            shape = list(out.shape) if out.shape is not None else []
            if indices.ndim == 0:
                shape.insert(axis, 1)
            cut = emit("Slice", [node.inputs[0], *bounds], out.dtype, shape)
            if indices.ndim == 0:
                cut = like(emit("Squeeze", [cut, emit.ints([axis])], out.dtype, []), out)
            substitute(out, cut)
            remove_dead(model.graph, node)
            changes.add("rows from the end")
        return changes
