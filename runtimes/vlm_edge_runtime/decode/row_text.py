"""One row's answer as it grows: tokens become text piece by piece, and stop strings cut it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol

from .stop import StopMatcher


class PieceDecoder(Protocol):
    """Tokens to text, one at a time; the pieces together are the decoded whole (`text.StreamDecoder`)."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class RowText:
    """The text of one row, with its stop strings. `text` is what may be shown so far."""

    def __init__(self, decoder: PieceDecoder, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._matcher = StopMatcher(stops)
        self._ends: list[int] = []  # length of the text after each token, before stop strings
        self._length = 0
        self.text = ""

    def push(self, token: int) -> str:
        """Takes a token and returns the text that may be shown now."""
        piece = self._decoder.push(token)
        self._length += len(piece)
        self._ends.append(self._length)
        return self._show(self._matcher.push(piece))

    def finish(self) -> str:
        """The answer ends: returns what was held back, unless a stop string is completed by it."""
        if self.stopped:
            return ""
        piece = self._decoder.flush()
        self._length += len(piece)
        return self._show(self._matcher.push(piece) + self._matcher.flush())

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._matcher.matched is not None

    def tokens_within(self) -> int:
        """How many tokens lie wholly within `text`: what is worth keeping in a KV cache after a stop string."""
        index = bisect_left(self._ends, len(self.text))
        exact = index < len(self._ends) and self._ends[index] == len(self.text)
        return index + exact if self.text else 0

    def _show(self, piece: str) -> str:
        self.text += piece
        return piece
