"""Inputs that nothing reads any more go."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass


class DropUnusedInputs(GraphPass):
    """Removes graph inputs without a reader, and says which.

    TensorRT warns of them and leaves them out of the engine; such a warning must mean that something was lost, so it must not
    come from what is known: positions in a decoder whose positions are biases by distance (T5), the ids of added tokens.
    """

    name: ClassVar[str] = "unused_inputs"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        for value in list(model.graph.inputs):
            if not value.uses() and not value.is_graph_output():
                model.graph.inputs.remove(value)
                changes.add("inputs")
                changes.note(f"nothing reads '{value.name}'")
        return changes
