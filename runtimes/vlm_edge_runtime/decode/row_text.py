"""One row's answer as it grows: tokens become text piece by piece, and stop strings cut it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from .stop import StopMatcher

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class IncrementalText:
    """Tokens to text, one at a time; the pieces together are what decoding all tokens at once gives.

    A token may hold part of a character (byte-level vocabularies), and what a token reads as may depend on the one before
    it (a leading space). So a short window before the new tokens is decoded with them, and text that ends in an incomplete
    character is held back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._window = 0  # where decoding starts
        self._done = 0  # tokens whose text was given out

    def push(self, token: int) -> str:
        """The text that this token completes; empty in the middle of a character."""
        self._tokens.append(token)
        text = self._pending()
        if text.endswith(_REPLACEMENT):
            return ""
        self._window, self._done = self._done, len(self._tokens)
        return text

    def flush(self) -> str:
        """What was held back, incomplete characters as U+FFFD."""
        text = self._pending()
        self._window = self._done = len(self._tokens)
        return text

    def _pending(self) -> str:
        before = self._decode(self._tokens[self._window : self._done]) if self._window < self._done else ""
        return self._decode(self._tokens[self._window :])[len(before) :]


class RowText:
    """The text of one row, with its stop strings. `text` is what may be shown so far."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        self._incremental = IncrementalText(decode)
        self._matcher = StopMatcher(stops)
        self._ends: list[int] = []  # length of the text after each token, before stop strings
        self._length = 0
        self.text = ""

    def push(self, token: int) -> str:
        """Takes a token and returns the text that may be shown now."""
        piece = self._incremental.push(token)
        self._length += len(piece)
        self._ends.append(self._length)
        return self._show(self._matcher.push(piece))

    def finish(self) -> str:
        """The answer ends: returns what was held back, unless a stop string is completed by it."""
        if self.stopped:
            return ""
        piece = self._incremental.flush()
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
