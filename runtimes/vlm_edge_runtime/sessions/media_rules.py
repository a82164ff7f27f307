"""Which parts of the memory each token of a prompt sees, for models whose cross-attention is masked token by token.

A rule is a function named by `TokenInput.rule`; families with such a mask add theirs to `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .media import Medium

Ids = npt.NDArray[np.int64]


@dataclass(slots=True, frozen=True)
class MediaTokens:
    """What a rule looks at: one row's `ids` int64 [S]; its `media` as memory, in order; the indices `at` of each one's tokens

    in the row (Ids, may be empty); and the decoder input's shape after batch and sequence (names for dynamic sizes).
    """

    ids: Ids
    media: Sequence[Medium]
    at: Sequence[Ids]
    shape: tuple[int | str, ...]


MediaRule = Callable[[MediaTokens], Ids]
"""Gives int64 [S, …], 1 where the token sees that part; the last prompt token's row also holds for generated tokens."""


def last_medium(row: MediaTokens) -> Ids:
    """A token sees the last medium whose tokens began at or before it, and no other: int64 [S, max(media, 1)]."""
    seen = np.zeros((len(row.ids), max(len(row.media), 1)), np.int64)
    for number, at in enumerate(row.at):
        if len(at):
            seen[int(at[0]) :] = 0
            seen[int(at[0]) :, number] = 1
    return seen


RULES: dict[str, MediaRule] = {"last_medium": last_medium}
"""Rules by name."""
