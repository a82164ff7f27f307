"""What a pass is: it edits a graph in place, may be run twice without further effect, and says what it changed."""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir


@dataclass(slots=True)
class Changes:
    """What one pass did to one graph: counts per kind of change, and notes on what it left alone and why."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, number: int = 1) -> None:
        """Counts `number` changes of one kind; zero leaves no trace."""
        if number:
            self.counts[what] += number

    def note(self, text: str) -> None:
        """Records why something was left as it was."""
        self.notes.append(text)

    def __bool__(self) -> bool:
        return bool(self.counts)


class GraphPass(abc.ABC):
    """A rewriting of one graph, in place.

    Weights stay where they are: a pass that changes a weight stores an `ir.LazyTensor`, evaluated once, when the graph is
    saved, so a large model never lies in memory whole. Running a pass a second time finds nothing to do.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def apply(self, model: ir.Model) -> Changes:
        """Edits the model and returns what was changed. Raises TargetError for what the target cannot express."""


def run_passes(model: ir.Model, passes: Iterable[GraphPass]) -> list[Changes]:
    """Runs passes in order; returns one `Changes` per pass (empty ones included: the report says what found nothing)."""
    return [graph_pass.apply(model) for graph_pass in passes]
