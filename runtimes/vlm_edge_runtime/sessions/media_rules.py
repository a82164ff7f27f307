"""Which parts of the memory each token of a prompt sees, for models whose cross-attention is masked token by token.

A rule is a function named by `TokenInput.rule`; families with such a mask add theirs to `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .media import Medium

Ids = npt.NDArray[np.int64]


@dataclass(slots=True, frozen=True)
class MediaTokens:
    """What a rule looks at: one row's `ids` int64 [S]; its `media` as memory, in order; the indices `at` of each one's tokens

    in the row (Ids, may be empty); and the decoder input's shape after batch and sequence (names for dynamic sizes).
    `end`: after this token nothing is seen until the next medium; None where there is no such token.
    """

    ids: Ids
    media: Sequence[Medium]
    at: Sequence[Ids]
    shape: tuple[int | str, ...]
    end: int | None = None


MediaRule = Callable[[MediaTokens], Ids]
"""Gives int64 [S, …], 1 where the token sees that part; the last prompt token's row also holds for generated tokens."""


def last_medium(row: MediaTokens) -> Ids:
    """A token sees the last medium whose tokens began at or before it, and no other: int64 [S, max(media, 1)] (Flamingo,

    arXiv 2204.14198, section 3.1.3). What follows an `end` sees none.
    """
    seen = np.zeros((len(row.ids), max(len(row.media), 1)), np.int64)
    ends = np.flatnonzero(row.ids == row.end) + 1 if row.end is not None else np.zeros(0, np.int64)
    starts = [int(at[0]) for at in row.at if len(at)] + [len(row.ids)]
    for number, (start, following) in enumerate(pairwise(starts)):
        until = min([int(end) for end in ends if start < end <= following] + [following])
        seen[start:until, number] = 1
    return seen


def last_run(row: MediaTokens) -> Ids:
    """A token sees the media of the last unbroken run of media tokens, each from its own on: int64 [S, max(media, 1), tiles].

    Of a medium only the tiles that it has are seen (Llama 3.2 Vision: `get_cross_attention_token_mask` of its processor).
    """
    tiles = row.shape[-1]
    assert isinstance(tiles, int)  # the decoder's signature has a fixed number
    seen = np.zeros((len(row.ids), max(len(row.media), 1), tiles), np.int64)
    starts = [int(at[0]) for at in row.at]
    end = len(row.ids)
    for number in reversed(range(len(starts))):
        if number + 1 < len(starts) and starts[number + 1] != starts[number] + 1:
            end = starts[number + 1]
        layout = row.media[number].layout
        seen[starts[number] : end, number, : layout.rows * layout.columns] = 1
    return seen


RULES: dict[str, MediaRule] = {"last_medium": last_medium, "last_run": last_run}
"""Rules by name."""
