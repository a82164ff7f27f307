"""Plans for any length of a text (of a sequence of states): the plans for some lengths, and what each of their sizes is of it.

A graph is followed for one length at a time. Two of its plans say how each number of rows and each place grows with the length;
a third one has to be what they say. Tables of positions are those of the longest length; shorter ones must begin as they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .errors import NotExpressible
from .panels import integers
from .plan_file import Buffer, Format, GraphKind, Plan, Ref, Step, Weight

_LENGTHS = (11, 14, 7)
"""Two that say how sizes grow, and one to compare; not all odd, or a length made even would look like one more."""
_MOST = 1 << 20
"""`GRAPH_LONGEST` in plan_graph.h."""
_MOST_TABLE = 1 << 13
"""Positions of a table: longer ones are not looked for."""


def open_size(graph: ir.Graph) -> str | None:
    """The name of the size, beside the first, that is open; None where all are fixed. Raises NotExpressible for several."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        sizes = list(value.shape)[1:] if value.shape is not None else []
        names |= {str(size.value): str(value.name) for size in sizes if not isinstance(size, int)}
    if len(names) > 1:
        raise NotExpressible(f"inputs '{names[min(names)]}' and '{names[max(names)]}' whose lengths differ")
    return next(iter(names), None)


def for_any_length(graph: ir.Graph, compiled: Callable[[int], Plan]) -> Plan:
    """`compiled`: the plan for one length. Raises NotExpressible where it is not the same for all but in its sizes."""
    try:
        plans = {length: compiled(length) for length in _LENGTHS}
    except NotExpressible:
        raise
    except Exception as error:  # whatever numpy and onnxruntime say of sizes that do not fit each other
        raise NotExpressible(f"a length of {max(_LENGTHS)} ({_said(error)})") from None
    tables = any(one is not None for steps in _together(plans) for one in _grown(steps))
    if not tables:
        return _Merged(plans, _LENGTHS[1], _MOST).plan()
    why = "no table of more rows is stored"
    for length in _longest(graph):
        try:
            plans[length] = compiled(length)
        except Exception as error:  # as above: a table of something else, longer than positions go
            why = f"{length} rows: {_said(error)}"
            continue
        return _Merged(plans, length, length).plan()
    raise NotExpressible(f"a table of positions whose longest length is not known ({why})")


def _said(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _longest(graph: ir.Graph) -> Iterator[int]:
    """How many rows stored tables have that something is taken from, the most first."""
    found = {
        size
        for node in graph
        if node.op_type in ("Gather", "Slice") and (value := node.inputs[0]) is not None and value.const_value is not None
        for size in value.const_value.shape
        if isinstance(size, int)
    }
    return iter(sorted((size for size in found if max(_LENGTHS) < size <= _MOST_TABLE), reverse=True))


def _together(plans: dict[int, Plan]) -> Iterator[list[Step]]:
    """The steps of all plans that are one. Raises NotExpressible where plans do not have the same steps."""
    if len({len(plan.steps) for plan in plans.values()}) > 1:
        raise NotExpressible("steps that depend on the length")
    for steps in zip(*(plan.steps for plan in plans.values()), strict=True):
        if len({(one.kind, one.width, len(one.inputs), len(one.outputs), len(one.weights)) for one in steps}) > 1:
            raise NotExpressible("steps that depend on the length")
        yield list(steps)


def _grown(steps: Sequence[Step]) -> Iterator[int | None]:
    """Of each weight of a step that is a sum with a table: whether it is one that grows with the length."""
    if steps[0].kind in (GraphKind.ADD, GraphKind.MULTIPLY):
        for weights in zip(*(step.weights for step in steps), strict=True):
            yield 1 if len({one.depth for one in weights if one is not None}) > 1 else None


@dataclass(slots=True)
class _Merged:
    """`written`: the length that sizes in the file are for; `longest`: the longest of any."""

    plans: dict[int, Plan]
    written: int
    longest: int

    def plan(self) -> Plan:
        for plan in self.plans.values():
            if len(plan.buffers) != len(self.plans[self.written].buffers):
                raise NotExpressible("buffers that depend on the length")
        base = self.plans[self.written]
        numbers = {length: {one: index for index, one in enumerate(plan.buffers)} for length, plan in self.plans.items()}
        rows = [self._buffer(same) for same in zip(*(plan.buffers for plan in self.plans.values()), strict=True)]
        steps = []
        for same in _together(self.plans):
            self._alike(same, numbers)
            steps.append(self._step(same))
        found = Plan(base.inputs, base.outputs, 0, 0, 0, [], graph=True)
        places = dict(zip(base.buffers, rows, strict=True))
        size = 8 * len(rows)
        table = Weight(
            Format.INTEGERS,
            1,
            2 * len(rows),
            size,
            lambda: np.asarray([places[one] for one in found.buffers], np.int32).reshape(-1),
        )
        found.steps = [Step(GraphKind.LENGTH, 1, weights=[table], arguments=[self.written, self.longest]), *steps]
        return found

    def _line(self, values: Sequence[int], what: str) -> tuple[int, int]:
        """(a, b) with value = a + b · length for every length."""
        (first, x), (second, y) = list(zip(self.plans, values, strict=True))[:2]
        grows = (y - x) // (second - first)
        start = x - grows * first
        if any(start + grows * length != value for length, value in zip(self.plans, values, strict=True)):
            raise NotExpressible(f"{what} that does not grow evenly with the length")
        return start, grows

    def _buffer(self, same: tuple[Buffer, ...]) -> tuple[int, int]:
        start, grows = self._line([one.rows for one in same], "a buffer")
        if len({(one.kind, one.width) for one in same}) > 1 or start < 0 or grows < 0:
            raise NotExpressible("a buffer that depends on the length in its width")
        return start, grows

    def _alike(self, same: list[Step], numbers: dict[int, dict[Buffer, int]]) -> None:
        places = []
        for step, known in zip(same, numbers.values(), strict=True):
            refs: list[Ref | None] = [*step.inputs, *step.outputs]
            places.append([None if ref is None else (known[ref.buffer], ref.column) for ref in refs])
        arguments = [step.arguments if step.kind != GraphKind.COPY else [] for step in same]
        if any(one != places[0] for one in places) or any(one != arguments[0] for one in arguments):
            raise NotExpressible("steps that depend on the length")
        if any(step.reals != same[0].reals for step in same):
            raise NotExpressible("a factor that depends on the length")

    def _step(self, same: list[Step]) -> Step:
        step = same[list(self.plans).index(self.written)]
        if step.kind == GraphKind.COPY:
            return self._copy(step, same)
        for weights in zip(*(one.weights for one in same), strict=True):
            found = [one for one in weights if one is not None]
            if found:
                self._weight(found, step.kind in (GraphKind.ADD, GraphKind.MULTIPLY))
        return step

    def _weight(self, same: list[Weight], rows: bool) -> None:
        """The weights of a step for each length: all the same, or (`rows`) tables that begin like the longest."""
        longest = max(same, key=lambda one: one.depth)
        if len({(one.format, one.width, one.block, 0 if rows else one.depth) for one in same}) > 1:
            raise NotExpressible("a weight that depends on the length")
        if longest.format == Format.VECTOR and longest.size < 1 << 26:
            table = _floats(longest)
            if not all(np.array_equal(_floats(one), table[: one.depth]) for one in same):
                raise NotExpressible("a table that depends on the length")

    def _copy(self, step: Step, same: list[Step]) -> Step:
        for tables in zip(*(one.weights[1:] for one in same), strict=True):
            self._weight([one for one in tables if one is not None], False)
        runs = [
            _runs(np.asarray(one.weights[0].make(), np.int64), one.arguments[0]) for one in same if one.weights[0] is not None
        ]
        if len({len(one) for one in runs}) > 1:
            raise NotExpressible("places that depend on the length")
        lines = [
            [self._line([int(value) for value in values], "a place") for values in zip(*found, strict=True)]
            for found in zip(*runs, strict=True)
        ]
        table = integers(np.asarray(lines, np.int64).reshape(-1))
        return Step(GraphKind.SPREAD, step.width, False, step.inputs, step.outputs, [table, *step.weights[1:]])


def _floats(weight: Weight) -> npt.NDArray[np.float32]:
    return np.asarray(weight.make(), np.float32).reshape(weight.depth, weight.width)


def _runs(pairs: npt.NDArray[np.int64], length: int) -> list[tuple[int, ...]]:
    """(to, from, count, step of to, step of from, numbers) of pairs (to, from) that follow each other evenly."""
    pairs = pairs.reshape(-1, 2)
    steps = np.diff(pairs, axis=0)
    found, at = [], 0
    while at < len(pairs):
        end = at + 1
        if end < len(pairs):
            other = np.flatnonzero((steps[at + 1 :] != steps[at]).any(axis=1))
            end = at + 2 + int(other[0]) if other.size else len(pairs)
        step = steps[at] if end > at + 1 else (0, 0)
        found.append((*(int(one) for one in pairs[at]), end - at, int(step[0]), int(step[1]), length))
        at = end
    return found
