"""Kept KV caches: a prompt whose beginning was already run takes its entries over and runs only the rest.

What an entry stands for is a *content id*: the token id, or for an image token a negative number made from the image's content
hash. Prefixes are equal when their content ids are, so an image token matches only an image with the same pixels. Where entries
also depend on a memory (cross-attention), all of a row's content ids are mixed with it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.engines.base import DecoderState
from vlm_edge_runtime.errors import DeviceError

from .token_inputs import Span, whole_blocks

ContentIds = npt.NDArray[np.int64]

MIN_REUSE = 8
"""Shorter common prefixes are run again: that costs less than looking after them."""


def common_prefix(first: ContentIds, second: ContentIds) -> int:
    """Number of leading content ids that are equal."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    return int(different.argmax()) if different.any() else length


def reusable(held: ContentIds, prompt: ContentIds, blocks: Sequence[Span] = ()) -> int:
    """Entries of `held` that `prompt` can take over. At least one token is left to run: its logits are needed.

    `blocks`: stretches of the prompt whose tokens see each other in both directions. An entry of such a stretch stands for all
    of it, so it is taken over whole or not at all.
    """
    length = whole_blocks(min(common_prefix(held, prompt), len(prompt) - 1), blocks)
    return length if length >= MIN_REUSE else 0


@dataclass(slots=True, frozen=True)
class Prefix:
    """What a row's prompt is looked up by. `bind` readies an empty row for it (static inputs); `bound_bytes`: what that takes."""

    contents: ContentIds
    blocks: Sequence[Span] = ()
    bind: Callable[[DecoderState, int], None] | None = None
    bound_bytes: int = 0

    def reusable(self, held: ContentIds) -> int:
        """Entries of `held` that this prompt can take over."""
        return reusable(held, self.contents, self.blocks)


@dataclass(slots=True, eq=False)
class Slots:
    """A KV cache in use, and what its entries stand for (`contents`, one array per row).

    Its user keeps `contents` no longer than what was really run; entries beyond are forgotten when it comes back.
    `broken`: an engine error left it in doubt, so it is not to be kept. `bound_bytes`: what each row's static inputs take.
    """

    state: DecoderState
    contents: list[ContentIds]
    touched: list[int] = field(default_factory=list)
    broken: bool = False
    bound_bytes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.touched = self.touched or [0] * self.state.batch
        self.bound_bytes = self.bound_bytes or [0] * self.state.batch

    def bind(self, row: int, prompt: Prefix) -> None:
        """Readies an empty row for a prompt."""
        self.contents[row] = prompt.contents[:0]
        if prompt.bind is not None:
            prompt.bind(self.state, row)
        self.bound_bytes[row] = prompt.bound_bytes

    def touch(self) -> None:
        """Notes how far each row has been written: that memory stays taken until the cache is closed.

        A GPU's cache takes all of it from the beginning (`held_entries` of its state).
        """
        held = getattr(self.state, "held_entries", 0)
        self.touched = [max(*pair, held) for pair in zip(self.touched, self.state.lengths, strict=True)]


Source = tuple[Slots | None, int, int]
"""A kept cache, a row of it, and how many of its entries a prompt can take over."""


class PrefixCache:
    """Hands out KV caches, and keeps those that come back while they fit `budget` bytes (the newest one always).

    `acquire` and `clear` are called by one thread at a time. `release` may come from any thread at any moment, the garbage
    collector's included, so it never waits.
    """

    def __init__(
        self, allocate: Callable[[int, int], DecoderState], entry_bytes: int, budget: int, *, enabled: bool = True
    ) -> None:
        self._allocate = allocate
        self._entry_bytes = entry_bytes
        self.budget = budget
        self.enabled = enabled
        self._kept: list[Slots] = []  # least recently used first
        self._returned: deque[Slots] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def acquire(self, prompts: Sequence[Prefix], capacity: int) -> Slots:
        """A cache with a row for each prompt; `contents[row]` is the prefix of the prompt that it holds already.

        A kept cache of the same number of rows is taken and cut back where that loses little; otherwise a new one is made
        and the longest prefixes, from whichever kept rows hold them, are copied into it. Rows that begin empty are bound. Raises
        DeviceError when memory cannot be had.
        """
        with self._lock:
            self._drain()
            taken, score = self._best_to_take(prompts, capacity)
            sources = [self._best_source(prompt) for prompt in prompts]
            copied = sum(length for _, _, length in sources)
            if taken is not None and score >= copied and sum(map(len, taken.contents)) - score <= score:
                self._kept.remove(taken)
                return self._closed_on_error(taken, lambda: self._cut_back(taken, prompts))
            slots = Slots(self._make(len(prompts), capacity, sources), [prompt.contents[:0] for prompt in prompts])
            self._closed_on_error(slots, lambda: self._copy(slots, prompts, sources))
            self._evict(self.budget - sum(len(prompt.contents) for prompt in prompts) * self._entry_bytes, keep=0)
            return slots

    def release(self, slots: Slots) -> None:
        """Takes a cache back: keeps it for later prompts, or frees it at once when keeping is off."""
        if not self.enabled or self._closed or slots.broken:
            slots.state.close()
            return
        self._returned.append(slots)
        # Whoever holds the lock drains, now or the next time; this thread may be the holder (garbage collection).
        if self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()

    def clear(self) -> None:
        """Frees every kept cache."""
        with self._lock:
            self._drain()
            self._evict(-1, keep=0)

    def close(self) -> None:
        """Frees every kept cache; those still in use are freed when they come back."""
        self._closed = True
        self.clear()

    @property
    def bytes(self) -> int:
        """Memory that the kept caches have written to."""
        with self._lock:
            self._drain()
            return self._size()

    def _make(self, batch: int, capacity: int, sources: list[Source]) -> DecoderState:
        """A new cache. When memory is short the kept ones make room, except those that prefixes are to be copied from."""
        try:
            return self._allocate(batch, capacity)
        except DeviceError:
            needed = [source for source, _, _ in sources]
            spare = [slots for slots in self._kept if slots not in needed]
            if not spare:
                raise
        for slots in spare:
            self._kept.remove(slots)
            slots.state.close()
        return self._allocate(batch, capacity)

    @staticmethod
    def _closed_on_error(slots: Slots, ready: Callable[[], None]) -> Slots:
        try:
            ready()
        except BaseException:
            slots.state.close()
            raise
        return slots

    @staticmethod
    def _cut_back(taken: Slots, prompts: Sequence[Prefix]) -> None:
        for row, prompt in enumerate(prompts):
            length = prompt.reusable(taken.contents[row])
            taken.state.truncate(row, length)
            if length:
                taken.contents[row] = prompt.contents[:length]
            else:
                taken.bind(row, prompt)

    def _copy(self, slots: Slots, prompts: Sequence[Prefix], sources: Sequence[Source]) -> None:
        for row, (prompt, (source, source_row, length)) in enumerate(zip(prompts, sources, strict=True)):
            slots.bind(row, prompt)
            if source is not None:
                slots.state.copy_prefix(row, source.state, source_row, length)
                slots.contents[row] = prompt.contents[:length]
                self._kept.remove(source)
                self._kept.append(source)

    def _best_to_take(self, prompts: Sequence[Prefix], capacity: int) -> tuple[Slots | None, int]:
        best: tuple[Slots | None, int] = (None, 0)
        for slots in self._kept:
            if slots.state.batch == len(prompts) and slots.state.capacity >= capacity:
                score = sum(prompt.reusable(held) for held, prompt in zip(slots.contents, prompts, strict=True))
                best = (slots, score) if score > best[1] else best
        return best

    def _best_source(self, prompt: Prefix) -> Source:
        best: Source = (None, 0, 0)
        for slots in self._kept:
            for row, held in enumerate(slots.contents):
                length = prompt.reusable(held)
                best = (slots, row, length) if length > best[2] else best
        return best

    def _drain(self) -> None:
        while self._returned:
            slots = self._returned.popleft()
            if self._closed:
                slots.state.close()
                continue
            slots.touch()
            for row, length in enumerate(slots.state.lengths):
                kept = min(length, len(slots.contents[row]))
                slots.contents[row] = slots.contents[row][:kept]
                slots.state.truncate(row, kept)
            self._kept.append(slots)
            self._evict(self.budget, keep=1)

    def _size(self) -> int:
        entries = sum(sum(slots.touched) for slots in self._kept)
        return entries * self._entry_bytes + sum(sum(slots.bound_bytes) for slots in self._kept)

    def _evict(self, budget: int, keep: int) -> None:
        while len(self._kept) > keep and self._size() > budget:
            self._kept.pop(0).state.close()
