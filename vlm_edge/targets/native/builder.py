"""Steps in the making: which buffer holds which value, and its form in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .errors import NotExpressible
from .plan_file import Buffer, BufferKind, Kind, Ref, Step, Weight
from .token_masks import MaskRule

PAST = "past_key_values."
SCALE = "_scale"
"""What the scales of a cache in 8 bits are called after its own name."""
_KNOWN = ("inputs_embeds", "position_ids", "seqlens_k", "total_sequence_length")


@dataclass(slots=True, frozen=True)
class Rows:
    """Where a value's rows are: `width` numbers from `ref` on. `last`: one row per row of the batch instead of one per token."""

    ref: Ref
    width: int
    last: bool = False


@dataclass(slots=True)
class Builder:
    """The steps so far."""

    steps: list[Step] = field(default_factory=list)
    values: dict[ir.Value, Rows] = field(default_factory=dict)
    codes: dict[Ref, Ref] = field(default_factory=dict)

    def rows(self, value: ir.Value | None) -> Rows:
        """Where a computed value is. Raises NotExpressible for one that is no rows of floats."""
        if value is None or value not in self.values:
            raise NotExpressible(f"'{value.name if value is not None else ''}' is not made of a row of numbers per token")
        return self.values[value]

    def floats(self, width: int) -> Ref:
        """A new buffer of floats."""
        return Ref(Buffer(BufferKind.FLOATS, width))

    def define(self, value: ir.Value, ref: Ref, width: int, last: bool) -> None:
        """Says where a value is from now on."""
        self.values[value] = Rows(ref, width, last)

    def quantised(self, rows: Rows) -> Ref:
        """The rows in 8 bits, made once."""
        if rows.ref not in self.codes:
            codes = Ref(Buffer(BufferKind.CODES, rows.width))
            self.codes[rows.ref] = codes
            self.add(Kind.QUANTIZE, rows.width, rows.last, [rows.ref], [codes])
        return self.codes[rows.ref]

    def add(
        self,
        kind: Kind,
        width: int,
        last: bool,
        inputs: list[Ref | None],
        outputs: list[Ref | None],
        weights: list[Weight | None] | None = None,
        arguments: list[int] | None = None,
        reals: list[float] | None = None,
    ) -> Step:
        """Appends a step."""
        step = Step(kind, width, last, inputs, outputs, weights or [], arguments or [], reals or [])
        self.steps.append(step)
        return step


class Context:
    """A decoder that is being translated: its inputs by name, and the steps so far.

    `caches`: names of its cache inputs, `further`: of those that are neither caches nor the usual ones; both in the graph's
    order, by which the steps number them. `by_head`: values [batch, heads, sequence, size]; their rows lie token by token all the
    same. `rows_of_all`: values that are one stored row for every token. `codes`: caches are in 8 bits, and each has its scales in
    a cache of its own, all of them after all others.
    """

    def __init__(self, model: ir.Model, *, codes: bool = False) -> None:
        self.model = model
        self.codes = codes
        self.made = Builder()
        self.inputs = {str(value.name): value for value in model.graph.inputs}
        self.caches = [name for name in self.inputs if name.startswith(PAST)]
        self.further = [name for name in self.inputs if name not in _KNOWN and not name.startswith(PAST)]
        self.vectors: dict[ir.Value, Weight] = {}
        self.masks: dict[ir.Value, MaskRule] = {}
        self.by_head: set[ir.Value] = set()
        self.rows_of_all: dict[ir.Value, npt.NDArray[np.float32]] = {}
        self.tables: dict[tuple[ir.Value, ir.Value], Ref] = {}

    def scales_of(self, caches: list[int]) -> list[int]:
        """The numbers of the caches' scales; none where they are floats."""
        return [len(self.caches) + one for one in caches] if self.codes else []
