"""From prompts to a KV cache that holds them: media encoded, memory made, what is not kept already run piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from vlm_edge_runtime.decode.stats import Stats
from vlm_edge_runtime.engines.base import DecoderState, SamplingParams

from .media import Features, Medium
from .memory import Arrays, size
from .parts import Parts
from .prefix_cache import Prefix, Slots, reusable
from .prompts import PromptRow
from .token_inputs import chunk_end

PREFILL_CHUNK = 512
"""Prompt tokens per decoder run: a cancelled call stops after the current one."""


class Prefill:
    """Fills rows for prompts. `between` is called between runs of graphs, and may raise to stop. Figures go to `stats`.

    `width`: rows of the cache for each prompt (beams): all are bound, the first is filled.
    """

    def __init__(
        self, parts: Parts, prompts: Sequence[PromptRow], stats: Stats, between: Callable[[], None], width: int = 1
    ) -> None:
        self._parts = parts
        self._prompts = prompts
        self._stats = stats
        self._between = between
        self._width = width
        self._memories: dict[str, Arrays] = {}
        self._reused = 0

    def acquire(self, capacity: int) -> Slots:
        """A cache whose rows are bound to their memories, and hold what could be taken over."""
        self._make_memories()
        return self._parts.kept.acquire([self._prefix(prompt) for prompt in self._prompts for _ in range(self._width)], capacity)

    def fill(self, slots: Slots, ready: Callable[[int, PromptRow, dict[str, Features]], None]) -> None:
        """Runs what is missing of every prompt; `ready(number, prompt, features)` is called after each."""
        rows = range(0, len(self._prompts) * self._width, self._width)
        shared = [self._shared_row(number, len(slots.contents[row])) for number, row in enumerate(rows)]
        starts = [max(length, len(slots.contents[row])) for row, (_, length) in zip(rows, shared, strict=True)]
        pairs = list(zip(self._prompts, starts, strict=True))
        features = self._encode([medium for prompt, start in pairs for medium in prompt.tokens.media_from(start)])
        began = time.perf_counter()
        for number, (prompt, start) in enumerate(pairs):
            source, length = shared[number]
            row = number * self._width
            if source is not None:
                slots.state.copy_prefix(row, slots.state, source * self._width, length)
                slots.contents[row] = prompt.content_ids[:length]
            for end in self.run_row(slots.state, row, prompt, start, features):
                slots.contents[row] = prompt.content_ids[:end]
            ready(number, prompt, features)
        slots.touch()
        self._count(starts, time.perf_counter() - began)

    def run_row(
        self, state: DecoderState, row: int, prompt: PromptRow, start: int, features: Mapping[str, Features]
    ) -> Iterator[int]:
        """Runs a prompt's tokens from `start` on; yields how far the row has come after each piece."""
        parts, tokens = self._parts, prompt.tokens
        while start < len(prompt):
            self._between()
            end = chunk_end(start, PREFILL_CHUNK, len(prompt), prompt.blocks)
            embeds = tokens.embed(parts.decoder, start, end, features)
            values = parts.token_inputs.values(tokens, start, end, features)
            state.prefill(row, embeds, prompt.positions[..., start:end], values or None)
            yield end
            start = end

    def start_row(
        self, state: DecoderState, row: int, prompt: PromptRow, params: SamplingParams, features: Mapping[str, Features]
    ) -> None:
        """Arms a filled row for decoding."""
        following = self._parts.token_inputs.following(prompt.tokens, features)
        state.start(row, params, prompt.history, prompt.next_position, following or None)

    def inputs(self, prompt: PromptRow) -> tuple[Arrays | None, dict[str, Features]]:
        """What one prompt's row is bound to (None: nothing), and the features of all media in it."""
        self._make_memories()
        bound = self._memories[_key(prompt)] if self._parts.memory.graphs.binds else None
        return bound, self._encode(prompt.tokens.media_from(0))

    def _prefix(self, prompt: PromptRow) -> Prefix:
        if not self._parts.memory.graphs.binds:
            return Prefix(prompt.content_ids, prompt.blocks)
        inputs = self._memories[_key(prompt)]
        return Prefix(prompt.content_ids, prompt.blocks, lambda state, row: state.bind(row, inputs), size(inputs))

    def _make_memories(self) -> None:
        """What the decoder reads besides tokens, for each prompt: kept, or made now from the features of its media."""
        memory = self._parts.memory
        if not memory.graphs.binds:
            return
        missing: dict[str, PromptRow] = {}
        for prompt in self._prompts:
            key = _key(prompt)
            if key in missing or key in self._memories:
                self._reused += _source_tokens(prompt)
            elif (kept := memory.get(key)) is not None:
                self._memories[key] = kept
                self._reused += _source_tokens(prompt)
            else:
                missing[key] = prompt
        needed = [medium for prompt in missing.values() for medium in _read_by_memory(prompt)]
        features = self._encode(needed)
        began = time.perf_counter()
        for key, prompt in missing.items():
            decoder = self._parts.decoder
            arrays = memory.graphs.inputs(prompt.memory_media, prompt.source, features, decoder, self._between)
            self._memories[key] = arrays
            memory.put(key, arrays)
        self._stats.prefill_s += time.perf_counter() - began

    def _encode(self, wanted: Sequence[Medium]) -> dict[str, Features]:
        if not wanted:
            return {}
        began = time.perf_counter()
        encoded = self._parts.modalities.features(wanted, self._between)
        self._stats.vision_s += time.perf_counter() - began
        self._stats.image_cache_misses += encoded.encoded
        return encoded.features

    def _shared_row(self, number: int, held: int) -> tuple[int | None, int]:
        """The earlier row of the batch whose prompt begins most like this one, where that beats the `held` entries."""
        best: tuple[int | None, int] = (None, held)
        prompt = self._prompts[number]
        for earlier in range(number if not self._parts.memory.graphs.recurrent else 0):
            length = reusable(self._prompts[earlier].content_ids, prompt.content_ids, prompt.blocks)
            if length > best[1]:
                best = (earlier, length)
        return best if best[0] is not None else (None, 0)

    def _count(self, starts: Sequence[int], seconds: float) -> None:
        stats = self._stats
        stats.prefill_s += seconds
        stats.reused_tokens = sum(starts) + self._reused
        stats.prefill_tokens = stats.prompt_tokens - stats.reused_tokens
        stats.prefix_cache_hits = sum(start > 0 for start in starts)
        stats.image_cache_hits = sum(len(prompt.media) for prompt in self._prompts) - stats.image_cache_misses


def _key(prompt: PromptRow) -> str:
    return prompt.memory_key or "memory/none"


def _source_tokens(prompt: PromptRow) -> int:
    return len(prompt.source) if prompt.source is not None else 0


def _read_by_memory(prompt: PromptRow) -> list[Medium]:
    return [*prompt.memory_media, *(prompt.source.media_from(0) if prompt.source is not None else [])]
