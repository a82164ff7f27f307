"""Toys with further inputs, and helpers that fill rows with them."""

from __future__ import annotations

import numpy as np
from toy_decoder import Toy
from toy_reference import Reference, Source, random_source

from vlm_edge_runtime.engines import EngineOptions, SamplingParams
from vlm_edge_runtime.engines.base import Decoder, DecoderState, Engine

OPTIONS = EngineOptions(threads=1, spin=False)
PROMPTS = [[3, 5, 7, 11, 13], [2, 4], list(range(20, 33))]
ENTRIES = [4, 8, 2]
TOYS = {
    "cross-attention": Toy(cross=True),
    "masks and features per token": Toy(cross=True, token_mask=True, feature=True, shared=True),
    "masks per token alone": Toy(cross=True, source_mask=False, token_mask=True),
    "images per token": Toy(cross=True, source_mask=False, token_mask=True, media=2),
    "blocks": Toy(blocks=True),
    "recurrent, no cache": Toy(cached=False, cross=True, recurrent=True),
    "recurrent and cached": Toy(cross=True, recurrent=True, feature=True),
    "no cache at all": Toy(cached=False, cross=True, shared=True),
}


class Bench:
    """One toy's engine, and helpers that fill its rows."""

    def __init__(self, engine: Engine, toy: Toy) -> None:
        self.toy = toy
        self.engine = engine
        self.decoder: Decoder = engine.decoder()
        self.reference = Reference(toy)

    def source(self, row: int) -> Source:
        return random_source(self.toy, ENTRIES[row], len(PROMPTS[row]), seed=row)

    def bind(self, state: DecoderState, row: int, source: Source) -> None:
        if source.bound:
            state.bind(row, source.bound)

    def prefill(self, state: DecoderState, row: int, tokens: list[int], values: dict[str, np.ndarray] | None) -> None:
        first = state.lengths[row]
        state.prefill(row, self.decoder.embed(np.array(tokens, np.int64)), np.arange(first, first + len(tokens)), values)

    def fill(
        self, state: DecoderState, row: int, prompt: list[int], source: Source, params: SamplingParams | None = None
    ) -> None:
        self.bind(state, row, source)
        self.prefill(state, row, prompt, source.prompt)
        self.start(state, row, prompt, source, params)

    def start(
        self, state: DecoderState, row: int, prompt: list[int], source: Source, params: SamplingParams | None = None
    ) -> None:
        state.start(row, params or SamplingParams(), np.array(prompt, np.int64), len(prompt), source.later)

    def filled(self, capacity: int = 48) -> DecoderState:
        """The three prompts with their sources, ready to decode."""
        state = self.decoder.allocate(3, capacity)
        for row in range(3):
            self.bind(state, row, self.source(row))
        for row, prompt in enumerate(PROMPTS):
            self.prefill(state, row, prompt, self.source(row).prompt)
            self.start(state, row, prompt, self.source(row))
        return state

    def expected(self, row: int, steps: int) -> list[int]:
        return self.reference.greedy(PROMPTS[row], self.source(row), steps)


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal within what float32 allows."""
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)
