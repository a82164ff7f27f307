"""Every node has a name, and one of its own."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass


class UniqueNames(GraphPass):
    """Names nodes that have none or share one: pre-flight, the parser's messages and its layers are found by them.

    A node that stands in another's place keeps that name; of those written out from one, each has its operator and a number
    behind it.
    """

    name: ClassVar[str] = "unique_names"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        taken: set[str] = set()
        for node in model.graph.all_nodes():
            wanted = node.name or f"node_{node.op_type}"
            name, number = wanted, 0
            while name in taken:
                number += 1
                name = f"{wanted}_{number}"
            taken.add(name)
            if name != node.name:
                node.name = name
                changes.add("nodes named")
        return changes
