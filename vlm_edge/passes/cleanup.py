"""Removes what a graph does not need, so that later passes see one spelling of each thing."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from .base import Changes, GraphPass


class Cleanup(GraphPass):
    """Dead nodes, unused weights, Identity, repeated subexpressions and constants written as nodes.

    Every other pass matches patterns by object identity (the same cosine, the same mask), which only holds once equal
    subexpressions are one node. Only small constants are compared by value, so that no weight is read from the disk.
    """

    name: ClassVar[str] = "cleanup"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        for what, step in (
            ("constants lifted", common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)),
            ("identities", _Identities()),
            ("equal small constants", common.DeduplicateInitializersPass(size_limit=1024)),
            ("equal subexpressions", common.CommonSubexpressionEliminationPass()),
            ("dead nodes", common.RemoveUnusedNodesPass()),
            ("unused opsets", common.RemoveUnusedOpsetsPass()),
        ):
            before = (sum(1 for _ in model.graph), len(model.graph.initializers))
            if step(model).modified:
                after = (sum(1 for _ in model.graph), len(model.graph.initializers))
                changes.add(what, max(1, before[0] - after[0], before[1] - after[1]))
        return changes


class _Identities(common.IdentityEliminationPass):
    """Leaves an Identity without which a value would be an output twice, or a subgraph's output come from outside it."""

    def _try_eliminate_identity_node(self, node: ir.Node) -> bool:
        if node.op_type == "Identity" and not node.domain and node.outputs[0].is_graph_output():
            source = node.inputs[0]
            if source is None or source.is_graph_output() or source.graph is not node.graph:
                return False
        return super()._try_eliminate_identity_node(node)
