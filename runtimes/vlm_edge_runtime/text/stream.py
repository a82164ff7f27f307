"""Decoding while tokens still arrive: what was shown is never taken back, and all pieces together are the decoded whole.

Three things stand in the way of decoding token by token: a character may be spread over several tokens, what a token reads as
may depend on its neighbours (the space before a word, and none before the first), and a run of byte tokens is decoded as a
whole. So a short window of shown tokens is decoded again with the new ones, and text that could still change waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from .cleanup import Cleanup

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Decodes(Protocol):
    """What a stream needs of a tokenizer."""

    cleanup: Cleanup
    special_ids: frozenset[int]
    byte_fallback_ids: frozenset[int]

    def decode_raw(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class StreamDecoder:
    """`push` tokens one by one, `flush` at the end: the pieces joined equal `Tokenizer.decode` of all tokens.

    Byte-fallback tokens (`<0xE2>` …) wait for the end of their run: one byte that does not fit turns the characters of the
    whole run into U+FFFD, so none of them is certain before.
    """

    def __init__(self, tokenizer: Decodes, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []  # the latest tokens, of which the first `_shown` are wholly given out
        self._shown = 0
        self._shown_text = ""  # what those read as
        self._waiting = ""  # decoded text that the clean-up may still rewrite
        self._started = False

    def push(self, token: int) -> str:
        """The text that became certain with this token; often one token's, sometimes none, sometimes more."""
        if self._skip and token in self._tokenizer.special_ids:
            return ""
        self._window.append(token)
        if token in self._tokenizer.byte_fallback_ids:
            return ""
        text = self._decode(self._window)
        if text.endswith(_INCOMPLETE) or not text.startswith(self._shown_text):
            return ""
        fresh = text[len(self._shown_text) :]
        self._advance()
        return self._clean(fresh)

    def extend(self, tokens: Iterable[int]) -> str:
        """`push` for several tokens."""
        return "".join([self.push(token) for token in tokens])

    def flush(self) -> str:
        """The rest, with U+FFFD for characters that were never completed. Nothing may be pushed after it."""
        self._waiting += self._decode(self._window)[len(self._shown_text) :]
        rest = self._tokenizer.cleanup.piece(self._waiting, first=not self._started, last=True)
        self._window, self._shown, self._shown_text, self._waiting = [], 0, "", ""
        return rest

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode_raw(tokens, self._skip)

    def _advance(self) -> None:
        """Everything in the window was given out; keep only its newest tokens, as context for the next."""
        newest = self._window[self._shown :]
        newest_text = self._decode(newest)
        if newest_text.strip():
            # A decoder that strips spaces at the beginning has nothing more to strip after a visible character.
            self._window, self._shown_text = newest, newest_text
        else:
            self._shown_text = self._decode(self._window)
        self._shown = len(self._window)

    def _clean(self, fresh: str) -> str:
        self._waiting += fresh
        cut = self._tokenizer.cleanup.settled(self._waiting)
        if not cut:
            return ""
        piece = self._tokenizer.cleanup.piece(self._waiting[:cut], first=not self._started, last=False)
        self._waiting = self._waiting[cut:]
        self._started = self._started or bool(piece)
        return piece
