"""What a decoder reads for each token besides its embedding: blocks, features at media tokens, masks over the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.bundle.manifest import TensorSpec, TokenInput
from vlm_edge_runtime.errors import BundleError

from .media import Array, Features
from .media_rules import RULES, MediaTokens
from .token_rows import Ids, TokenRow, runs

Span = tuple[int, int]
"""[start, end) of tokens."""


class TokenInputs:
    """The per-token inputs of one decoder. Raises BundleError for a rule this version does not know."""

    def __init__(self, inputs: Sequence[TokenInput], specs: Mapping[str, TensorSpec]) -> None:
        self._inputs = tuple(inputs)
        self._specs = specs
        for each in self._inputs:
            if each.name not in specs:
                raise BundleError(f"the manifest names a per-token input {each.name!r} that the decoder does not have.")
            if each.kind == "media" and each.rule not in RULES:
                raise BundleError(f"the decoder's {each.name!r} follows rule {each.rule!r}; known are: {', '.join(RULES)}.")

    def blocks(self, row: TokenRow) -> list[Span]:
        """Stretches of the row that must be run in one piece, ascending: tokens that see each other in both directions."""
        for each in self._inputs:
            if each.kind == "blocks":
                return _spans(each, row)
        return []

    def values(self, row: TokenRow, start: int, end: int, features: Mapping[str, Features]) -> dict[str, Array]:
        """Arrays [end − start, …] of the tokens in [start, end), by input. `features` has those of `row.media_from(start)`."""
        return {each.name: self._of(each, row, start, end, features) for each in self._inputs}

    def following(self, row: TokenRow, features: Mapping[str, Features]) -> dict[str, Array]:
        """What every generated token has, by input; zeros are left out."""
        last = len(row) - 1
        return {each.name: self._of(each, row, last, last + 1, features)[0] for each in self._inputs if each.decode == "last"}

    def _of(self, each: TokenInput, row: TokenRow, start: int, end: int, features: Mapping[str, Features]) -> Array:
        if each.kind == "blocks":
            return block_ids(_spans(each, row), start, end)
        if each.kind == "features":
            return self._features(each.name, row, start, end, features)
        memory = [one for one in row.placed if one.modality.joins == "memory"]
        media, at = [one.medium for one in memory], [one.at for one in memory]
        tokens = MediaTokens(row.ids, media, at, self._specs[each.name].shape[2:], each.end)
        return RULES[each.rule](tokens)[start:end]

    def _features(
        self, name: str, row: TokenRow, start: int, end: int, features: Mapping[str, Features]
    ) -> npt.NDArray[np.float32]:
        shape = self._specs[name].shape
        width = shape[-1]
        if len(shape) != 3 or isinstance(width, str):
            raise BundleError(f"the decoder's {name!r} has shape {list(shape)}; features are [batch, sequence, hidden].")
        found = np.zeros((end - start, width), np.float32)
        for one in row.placed:
            first, last = np.searchsorted(one.at, (start, end))
            if first == last or one.modality.joins == "memory":
                continue
            array = features[one.medium.key].others.get(name)
            if array is not None:
                found[one.at[first:last] - start] = array.reshape(-1, width)[first:last]
        return found


def block_ids(blocks: Sequence[Span], start: int, end: int) -> Ids:
    """int64 [end − start]: the number, from 1, of the block that each token of [start, end) is in; 0 where it is in none."""
    found = np.zeros(end - start, np.int64)
    for number, (first, last) in enumerate(blocks, 1):
        found[max(first - start, 0) : max(last - start, 0)] = number
    return found


def whole_blocks(index: int, blocks: Sequence[Span]) -> int:
    """The last place at or before `index` where a row may be cut: not inside a block."""
    return next((start for start, end in blocks if start < index < end), index)


def chunk_end(start: int, size: int, length: int, blocks: Sequence[Span]) -> int:
    """Where a piece of about `size` tokens from `start` ends: no block is cut, so one longer than that is run whole."""
    end = min(start + size, length)
    cut = whole_blocks(end, blocks)
    return cut if cut > start else next(last for first, last in blocks if first < end < last)


def _spans(each: TokenInput, row: TokenRow) -> list[Span]:
    if each.blocks == "prompt":
        return [(0, len(row))] if len(row) else []
    if each.blocks == "prefix":
        return [(0, row.prefix)] if row.prefix else []
    return sorted(span for one in row.placed if one.fills for span in runs(one.at))
