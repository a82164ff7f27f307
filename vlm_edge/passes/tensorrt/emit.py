"""Writing several nodes in the place of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.graph import add_initializer, constant, insert, typed
from vlm_edge.passes.strong_types import PRECISION

Dim = int | str | ir.SymbolicDim | None
LOWEST = np.float32(-65504.0)
"""What a hidden position's score becomes: the lowest number of fp16, so that the graph may be typed later without overflow."""

_PREFIX = "vlm_edge."


class Emit:
    """Puts nodes in front of `before`, each with the metadata of the node they replace (`source`): its module path above all.

    Every value gets a type and a shape: later passes read both.
    """

    def __init__(self, before: ir.Node, source: ir.Node | None = None) -> None:
        if not isinstance(before.graph, ir.Graph):
            raise ValueError(f"node {before.name} is not in the main graph")
        self.graph: ir.Graph = before.graph
        self.before = before
        self.metadata = dict(source.metadata_props) if source is not None else {}
        self._name = source.name if source is not None else None
        self._made: Counter[str] = Counter()

    def __call__(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType | None,
        shape: Sequence[Dim],
        attributes: dict[str, Any] | None = None,
        *,
        full: bool = False,
    ) -> ir.Value:
        """One node with one output. `full`: it must compute in fp32 when the graph is typed."""
        return self.node(op, inputs, [(dtype, shape)], attributes, full=full).outputs[0]

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[tuple[ir.DataType | None, Sequence[Dim]]],
        attributes: dict[str, Any] | None = None,
        *,
        full: bool = False,
    ) -> ir.Node:
        """One node with as many outputs as types and shapes are given."""
        made = insert(self.before, op, inputs, attributes, outputs=len(outputs), name=self._named(op))
        made.metadata_props.update(self.metadata)
        if full:
            made.metadata_props[PRECISION] = "fp32"
        for value, (dtype, shape) in zip(made.outputs, outputs, strict=True):
            typed(value, dtype, shape)
        return made

    def _named(self, op: str) -> str | None:
        """The source's name with the operator behind it, and a number from the second on."""
        if not self._name:
            return None
        self._made[op] += 1
        return f"{self._name}.{op}" + (f"_{self._made[op] - 1}" if self._made[op] > 1 else "")

    def const(self, name: str, array: npt.ArrayLike, dtype: npt.DTypeLike) -> ir.Value:
        """A stored constant; the same name with the same numbers is one tensor."""
        wanted = np.asarray(array, dtype)
        known = self.graph.initializers.get(f"{_PREFIX}{name}")
        found = constant(known)
        if known is not None and found is not None and found.dtype == wanted.dtype and np.array_equal(found, wanted):
            return known
        stored = ir.tensor(wanted)  # a tensor, for an array without axes would be stored as one with an axis
        made = add_initializer(self.graph, f"{_PREFIX}{name}", stored)
        stored.name = made.name
        return made

    def ints(self, values: Sequence[int]) -> ir.Value:
        """A stored int64 vector: a shape, axes, bounds."""
        text = "_".join(str(value) for value in values)
        return self.const(f"ints.{text}", list(values), np.int64)
