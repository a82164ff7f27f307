"""Prompt-lookup speculation: what follows is drafted from what followed the same tokens before, and checked by the decoder.

A. Saxena, "Prompt Lookup Decoding" (github.com/apoorvumang/prompt-lookup-decoding, 2023); the check is Leviathan et al.'s
(arXiv 2211.17192) for a greedy choice. No second model: a table that is read out, a question that is repeated in the answer, a
list whose items begin alike are copied at several tokens a step. Answers without repetitions gain nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
_LONGEST_PAUSE = 15


@dataclass(slots=True, frozen=True)
class PromptLookup:
    """At most `num_tokens` are drafted at a time, from what followed the last `max_ngram` tokens before, else fewer of them.

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
            f"{NUM_TOKENS}={tokens} does not go with {obstacle}: drafts are checked against the greedy choice of single steps. "
            "Leave one of them out."
        )
    return PromptLookup(tokens, size, asked) if tokens and obstacle is None else None


def draft(ids: Ids, count: int, longest: int) -> Ids:
    """Up to `count` tokens that followed the end of `ids` int64 [n] when it was there before; none where it was not.

    The longest end of at most `longest` tokens that was there decides; of several places the last one that has `count` tokens
    after it, else the first, which has most. Nothing is copied from the first negative number on.
    """
    if not len(ids) or count < 1:
        return ids[:0]
    ends = np.flatnonzero((ids[:-1] == ids[-1]) & (ids[1:] >= 0))
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
        return found[: int(barred.argmax())] if barred.any() else found
    return ids[:0]


class LookupRow:
    """One answer: the tokens before and in it, and how much is drafted next.

    `history` int64 [n]: the prompt's tokens, negative ones where they stand for images. `limit`: most new tokens.

    A draft costs a part of a step for each of its tokens, accepted or not. So a row drafts twice as many after one that was
    accepted whole, one more than were accepted after another, and pauses while single tokens are refused, each time for twice as
    many steps.
    """

    def __init__(self, history: Ids, limit: int, lookup: PromptLookup) -> None:
        self._ids = np.empty(len(history) + limit, np.int64)
        self._ids[: len(history)] = history
        self._length = len(history)
        self._lookup = lookup
        self._width = lookup.num_tokens
        self._pause = self._wait = 0
        self.left = limit
        self.open = True

    def draft(self, room: int) -> list[int]:
        """What may follow; no more than would still be part of the answer, or than the cache has `room` for."""
        if self._wait:
            self._wait -= 1
            return []
        count = min(self._width, self.left - 1, room)
        found: list[int] = draft(self._ids[: self._length], count, self._lookup.max_ngram).tolist()
        return found

    def take(self, tokens: Sequence[int], drafted: int) -> None:
        """Adds new tokens, of which all but one were drafted, and learns from that."""
        self._ids[self._length : self._length + len(tokens)] = tokens
        self._length += len(tokens)
        self.left -= len(tokens)
        if not drafted:
            return
        accepted = len(tokens) - 1
        if accepted >= drafted:
            self._width = min(2 * self._width, self._lookup.num_tokens)
        elif accepted == 0 and self._width == 1:
            self._pause = min(2 * self._pause + 1, _LONGEST_PAUSE)
            self._wait = self._pause
        else:
            self._width = min(accepted + 1, self._lookup.num_tokens)
        if accepted:
            self._pause = 0


class PromptLookupLoop:
    """A token loop (`decode` as the engine's) in which drafts of each row are run together with its newest token.

    Greedy rows only: their tokens are those of single steps, bit for bit. `drafted`, `accepted`: tokens so far that were run as
    drafts, and those of them that became part of an answer, each of which saved a step.
    """

    def __init__(self, state: VerifyingState, rows: Sequence[LookupRow], cancelled: Callable[[], bool]) -> None:
        self._state = state
        self._rows = list(rows)
        self._cancelled = cancelled
        self.steps = self.drafted = self.accepted = 0

    def decode(self, max_steps: int) -> list[RowTokens]:
        """Up to `max_steps` passes over the open rows, fewer when one of them has all its tokens. Raises as the engine's."""
        produced = [RowTokens(finished=not row.open) for row in self._rows]
        for _ in range(max_steps):
            if self._cancelled() or not any(row.open for row in self._rows):
                break
            drafts = self._drafts()
            new = self._state.verify(drafts) if any(drafts) else self._state.decode(1)
            if not any(one.tokens for one in new):
                break  # cancelled
            self.steps += 1
            for row, sum_, one, drafted in zip(self._rows, produced, new, drafts, strict=True):
                if row.open and one.tokens:
                    self._take(row, sum_, one, len(drafted))
            if any(row.open and row.left < 1 for row in self._rows):
                break
        return produced

    def drop(self, row: int) -> None:
        """The row takes no further part; the caller truncates it."""
        self._rows[row].open = False

    def _drafts(self) -> list[list[int]]:
        if not self.steps:
            return [[] for _ in self._rows]  # no row has a newest token yet
        # The newest token takes an entry itself.
        room = [self._state.capacity - length - 1 for length in self._state.lengths]
        return [row.draft(free) if row.open else [] for row, free in zip(self._rows, room, strict=True)]

    def _take(self, row: LookupRow, produced: RowTokens, new: RowTokens, drafted: int) -> None:
        produced.tokens += new.tokens
        produced.logprobs += new.logprobs
        produced.top_logprobs += new.top_logprobs
        produced.finished = new.finished
        row.take(new.tokens, drafted)
        row.open = not new.finished
        self.drafted += drafted
        self.accepted += len(new.tokens) - 1
