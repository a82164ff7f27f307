"""Prompt-lookup speculation: what follows is guessed from what followed the same tokens before, and checked by the decoder.

A. Saxena, "Prompt Lookup Decoding" (github.com/apoorvumang/prompt-lookup-decoding, 2023); the check is Leviathan et al.'s
(arXiv 2211.17192) for a greedy choice. No second model: a table that is read out, a question that is repeated in the answer, a
list whose items begin alike are copied at several tokens a step. Answers without repetitions gain nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_edge_runtime.engines.base import RowTokens, VerifyingState
from vlm_edge_runtime.errors import OptionError

from .option_values import integer
from .processors import Ids

NUM_TOKENS, NGRAM_SIZE = "prompt_lookup_num_tokens", "max_matching_ngram_size"
"""transformers' names, as keywords and as keys of generation_config.json."""
_NGRAM_SIZE = 2  # transformers' default
_NOTHING = -1
"""Stands for tokens that are never copied."""


@dataclass(slots=True, frozen=True)
class PromptLookup:
    """At most `num_tokens` are guessed at a time, from what followed the last `max_ngram` tokens before, else fewer of them.

    `asked`: by the caller, who is told where it cannot be had. In a file it is a wish for speed, which changes no token: there it
    is without effect where something else that is asked for, or the build, does not allow it.
    """

    num_tokens: int
    max_ngram: int = _NGRAM_SIZE
    asked: bool = True


def read_lookup(config: Mapping[str, Any], given: Mapping[str, Any], obstacle: str | None) -> PromptLookup | None:
    """The caller's keywords over the file's keys; 0 tokens is off. `obstacle`: an option that does not go with it, as text.

    Raises OptionError.
    """
    merged = {**config, **given}
    if NGRAM_SIZE in given and not merged.get(NUM_TOKENS):
        raise OptionError(f"{NGRAM_SIZE}={given[NGRAM_SIZE]!r} has no effect without {NUM_TOKENS}: pass that with it.")
    tokens = integer(NUM_TOKENS, merged.get(NUM_TOKENS, 0), 0)
    size = integer(NGRAM_SIZE, merged.get(NGRAM_SIZE, _NGRAM_SIZE), 1)
    asked = bool(given.get(NUM_TOKENS))
    if tokens and asked and obstacle is not None:
        raise OptionError(
            f"{NUM_TOKENS}={tokens} does not go with {obstacle}: guesses are checked against the greedy choice of a single row. "
            "Leave one of them out."
        )
    return PromptLookup(tokens, size, asked) if tokens and obstacle is None else None


def guess(ids: Ids, count: int, longest: int) -> Ids:
    """Up to `count` tokens that followed the end of `ids` int64 [n] when it was there before; none where it was not.

    The longest end of at most `longest` tokens that was there decides; of several places the last one that has `count` tokens
    after it, else the first, which has most. Nothing is copied from the first negative number on.
    """
    ends = np.flatnonzero(ids[:-1] == ids[-1]) if len(ids) else ids
    for size in range(min(longest, len(ids) - 1), 0, -1):
        same = ends[ends >= size - 1]
        for back in range(1, size):
            same = same[ids[same - back] == ids[-1 - back]]
        if not len(same):
            continue
        full = same[same + count < len(ids)]
        start = int(full[-1] if len(full) else same[0]) + 1
        found = ids[start : start + count]
        barred = found < 0
        found = found[: int(barred.argmax())] if barred.any() else found
        if len(found):
            return found
    return ids[:0]


class LookupRow:
    """One answer: the tokens before and in it, and how much may be guessed next.

    `history` int64 [n]: the prompt's; those in `barred` stand for images and are never guessed. `limit`: most new tokens.

    A guess costs a part of a step for each of its tokens, kept or not. So a row guesses twice as many after a guess that held,
    one more than held after another, and pauses, for twice as many steps each time, while single guesses fail.
    """

    def __init__(self, history: Ids, limit: int, lookup: PromptLookup, barred: Collection[int]) -> None:
        self._ids = np.empty(len(history) + limit, np.int64)
        self._ids[: len(history)] = np.where(np.isin(history, list(barred)), _NOTHING, history)
        self._length = len(history)
        self._lookup = lookup
        self._width = lookup.num_tokens
        self._pause = self._wait = 0
        self.left = limit
        self.open = True

    def guess(self, room: int) -> list[int]:
        """What may follow; no more than would still be part of the answer, or than the cache has `room` for."""
        count = min(self._width, self.left - 1, room)
        if count < 1:
            return []
        if self._wait:
            self._wait -= 1
            return []
        return guess(self._ids[: self._length], count, self._lookup.max_ngram).tolist()

    def take(self, tokens: Sequence[int], guessed: int) -> None:
        """Adds new tokens, of which all but one were guessed."""
        self._ids[self._length : self._length + len(tokens)] = tokens
        self._length += len(tokens)
        self.left -= len(tokens)
        held = len(tokens) - 1
        if not guessed:
            return
        if held >= guessed:
            self._width = min(2 * self._width, self._lookup.num_tokens)
        elif held == 0 and self._width == 1:
            self._pause = min(2 * self._pause + 1, 15)
            self._wait = self._pause
        else:
            self._width = max(1, min(held + 1, self._lookup.num_tokens))
        if held:
            self._pause = 0


class PromptLookupLoop:
    """A token loop (`decode` as the engine's) in which each row's guesses are run together with its newest token.

    Greedy rows only: their tokens are those of single steps. `guessed`, `held`: tokens so far that were run as guesses, and
    those of them that became part of an answer, each of which saved a step.
    """

    def __init__(self, state: VerifyingState, rows: Sequence[LookupRow], cancelled: Callable[[], bool]) -> None:
        self._state = state
        self._rows = list(rows)
        self._cancelled = cancelled
        self.steps = self.guessed = self.held = 0

    def decode(self, max_steps: int) -> list[RowTokens]:
        """Up to `max_steps` passes over the open rows, fewer when one of them has all its tokens. Raises as the engine's."""
        produced = [RowTokens(finished=not row.open) for row in self._rows]
        for _ in range(max_steps):
            if self._cancelled() or not any(row.open for row in self._rows):
                break
            guesses = self._guesses()
            new = self._state.verify(guesses) if any(guesses) else self._state.decode(1)
            if not any(one.tokens for one in new):
                break  # cancelled
            self.steps += 1
            for row, sum_, one, guessed in zip(self._rows, produced, new, guesses, strict=True):
                if row.open:
                    self._take(row, sum_, one, len(guessed))
            if any(row.open and row.left < 1 for row in self._rows):
                break
        return produced

    def drop(self, row: int) -> None:
        """The row takes no further part; the caller truncates it."""
        self._rows[row].open = False

    def _guesses(self) -> list[list[int]]:
        if not self.steps:
            return [[] for _ in self._rows]  # no row has a newest token yet
        # The newest token takes an entry itself.
        room = [self._state.capacity - length - 1 for length in self._state.lengths]
        return [row.guess(free) if row.open else [] for row, free in zip(self._rows, room, strict=True)]

    def _take(self, row: LookupRow, produced: RowTokens, new: RowTokens, guessed: int) -> None:
        produced.tokens += new.tokens
        produced.logprobs += new.logprobs
        produced.top_logprobs += new.top_logprobs
        produced.finished = new.finished
        row.take(new.tokens, guessed)
        row.open = not new.finished
        self.guessed += guessed
        self.held += len(new.tokens) - 1 if guessed else 0
