"""One row of a decoder state as the host knows it. Length, pending token and position are in the table that the device shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vlm_edge_runtime import _native

from .base import Array, SamplingParams
from .cuda_sampler import RowSampler
from .decoder_inputs import DecoderInputs, Sizes

Named = dict[str, Array]


@dataclass(slots=True)
class Row:
    """What a row is bound to, and where it stands."""

    device_sampler: RowSampler
    bound: Named | None = None
    bound_sizes: Sizes = field(default_factory=dict)
    used: bool = False
    """Whether anything ran since it was bound."""
    sizes: Sizes = field(default_factory=dict)
    token_inputs: Named | None = None
    outputs: Named | None = None
    """Further outputs of the newest token; None: they are on the device, as the last step left them."""
    logits_valid: bool = False
    pushed: bool = False
    params: SamplingParams = field(default_factory=SamplingParams)
    host_sampler: _native.Sampler | None = None
    """Chooses the row's tokens where the device's kernels cannot."""
    armed: bool = False
    finished: bool = False
    tainted: bool = False
    """Its cache may hold NaN."""

    @property
    def active(self) -> bool:
        return self.armed and not self.finished

    def forget(self) -> None:
        self.logits_valid = self.pushed = self.armed = self.finished = False
        self.token_inputs = None
        self.outputs = {}


def stacked_inputs(inputs: DecoderInputs, rows: Sequence[Row]) -> Named:
    """Static inputs and generated tokens' values of all rows, `[batch, …]` each, filled with zeros to the longest.

    A row that is bound to nothing gets what another one is bound to: it runs along, and must not compute NaN.
    """
    sizes = inputs.longest([row.sizes for row in rows])
    named = {dim for spec in (*inputs.static.values(), *inputs.tokens.values()) for dim in spec.shape[1:] if isinstance(dim, str)}
    sizes = {dim: max(1, sizes.get(dim, 0)) for dim in named - {"sequence"}}
    found: Named = {}
    bound = [row.bound for row in rows if row.bound is not None]
    for name in inputs.static:
        found[name] = inputs.stack(name, [(row.bound if row.bound is not None else bound[0])[name] for row in rows], sizes)
    values = [row.token_inputs if row.token_inputs is not None else inputs.check_tokens(None, None, row.sizes)[0] for row in rows]
    for name in inputs.tokens:
        found[name] = inputs.stack(name, [one[name] for one in values], sizes)[:, None]
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def chunk_ends(tokens: int, longest: int | None, blocks: Array | None) -> list[int]:
    """Where a prefill of `tokens` tokens is cut, so that no piece is longer than `longest`; never inside a block (`block_ids`).

    A block longer than that stays whole: whether it fits is the engine's to say.
    """
    if longest is None or tokens <= longest:
        return [tokens]
    ends: list[int] = []
    start = 0
    while tokens - start > longest:
        end = start + longest
        while blocks is not None and end > start and blocks[end] != 0 and blocks[end] == blocks[end - 1]:
            end -= 1
        if end == start:  # one block from here to beyond: whole
            assert blocks is not None
            end = start + longest
            while end < tokens and blocks[end] == blocks[end - 1]:
                end += 1
        ends.append(end)
        start = end
    if start < tokens:
        ends.append(tokens)
    return ends
