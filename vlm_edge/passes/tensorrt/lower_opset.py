"""States the opset that a graph's operators are of."""

from __future__ import annotations

from typing import ClassVar

import onnx
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge_runtime.errors import TargetError

_CHANGED: dict[str, int] = {"GroupNormalization": 21}
"""Operators whose meaning (not only their types) changed, and in which version: they cannot be restated across it."""
_UNSAID = {("ScatterND", "reduction"): "none", ("ScatterElements", "reduction"): "none"}
"""Attributes that say what holds anyway, and that older parsers refuse to read whatever they say (TensorRT 10.3)."""
_IR_VERSIONS = ((20, 10), (22, 10), (23, 11))
"""(up to this opset, IR version): ONNX 1.16, which TensorRT 10.3 was built with, reads IR version 10 at most."""


class LowerOpset(GraphPass):
    """Restates the graph at another version of the standard opset, where every node has the same meaning in both.

    Between opsets 20 and 24 nearly all operators only learnt further types. An operator that the version does not have, an
    attribute or input that it does not know, and one whose meaning changed, raise TargetError by name: a pass must have rewritten
    them before.
    """

    name: ClassVar[str] = "opset"

    def __init__(self, version: int) -> None:
        self.version = version

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        before = model.graph.opset_imports.get("") or 0
        for node in model.graph.all_nodes():
            if not node.domain:
                changes.add("needless attributes", _unsaid(node))
                self._check(node, before)
        if before != self.version:
            model.graph.opset_imports[""] = self.version
            changes.add(f"opset {self.version}")
        model.ir_version = next((number for limit, number in _IR_VERSIONS if self.version <= limit), 11)
        return changes

    def _check(self, node: ir.Node, before: int) -> None:
        label = f"{node.op_type} {node.name or node.outputs[0].name!r}"
        try:
            schema = onnx.defs.get_schema(node.op_type, self.version, "")
        except onnx.defs.SchemaError:
            raise TargetError(f"{label} does not exist in opset {self.version}, which is the target's newest.") from None
        unknown = [name for name in node.attributes if name not in schema.attributes and node.attributes[name].value is not None]
        if unknown or len(node.inputs) > schema.max_input:
            what = f"attribute '{unknown[0]}'" if unknown else f"input {schema.max_input}"
            raise TargetError(f"{label} has {what}, which opset {self.version} does not know.")
        changed = _CHANGED.get(node.op_type)
        if changed is not None and (before < changed) != (self.version < changed):
            raise TargetError(
                f"{label} means something else in opset {self.version} than in {before}: it must be rewritten first."
            )


def _unsaid(node: ir.Node) -> int:
    needless = [
        name
        for name, value in node.attributes.items()
        if (node.op_type, name) in _UNSAID and value.value == _UNSAID[node.op_type, name]
    ]
    for name in needless:
        del node.attributes[name]
    return len(needless)
