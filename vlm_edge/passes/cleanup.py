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
            ("identities", common.IdentityEliminationPass()),
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
