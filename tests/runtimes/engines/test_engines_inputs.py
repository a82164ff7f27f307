"""What a decoder reads besides its tokens, on both engines, against numpy: sources, masks, features, blocks, recurrent state."""

from __future__ import annotations

import numpy as np
import pytest
from toy_bench import PROMPTS, TOYS, close
from toy_decoder import Toy
from toy_reference import Source

from vlm_edge_runtime.engines import EngineOptions, SamplingParams
from vlm_edge_runtime.errors import ContextLengthError


def test_rows_decode_together_exactly_as_alone(bench) -> None:
    expected = [bench.expected(row, 8) for row in range(3)]
    state = bench.filled()
    for row, prompt in enumerate(PROMPTS):
        close(state.logits(row), bench.reference.run(prompt, bench.source(row))["logits"])
    together: list[list[int]] = [[], [], []]
    for steps in (1, 3, 4):
        for row, produced in enumerate(state.decode(steps)):
            together[row] += produced.tokens
    assert together == expected
    for row, prompt in enumerate(PROMPTS):
        sequence = [*prompt, *expected[row][:7]]
        close(state.logits(row), bench.reference.run(sequence, bench.source(row))["logits"])
    alone = bench.decoder.allocate(1, 48)
    bench.fill(alone, 0, PROMPTS[1], bench.source(1))
    assert alone.decode(8)[0].tokens == expected[1]


def test_prefill_in_parts(bench) -> None:
    if bench.toy.blocks:
        pytest.skip("a block must be given in one call")
    source, prompt = bench.source(2), PROMPTS[2]
    state = bench.decoder.allocate(2, 32)
    bench.bind(state, 1, source)
    for first, last in ((0, 5), (5, 6), (6, len(prompt))):
        bench.prefill(state, 1, prompt[first:last], {name: array[first:last] for name, array in source.prompt.items()})
    bench.start(state, 1, prompt, source)
    assert state.decode(6)[1].tokens == bench.expected(2, 6)


def test_values_per_token_that_are_not_given_are_zeros(make) -> None:
    bench = make(Toy(feature=True, blocks=True))
    source = bench.source(0)
    zeros = Source(prompt={"deepstack.0": np.zeros((5, 32), np.float32), "block_ids": np.zeros(5, np.int64)})
    zeros.later = {"deepstack.0": np.zeros(32, np.float32)}
    state = bench.decoder.allocate(2, 32)
    bench.prefill(state, 0, PROMPTS[0], None)
    bench.prefill(state, 1, PROMPTS[0], {"block_ids": source.prompt["block_ids"]})
    close(state.logits(0), bench.reference.run(PROMPTS[0], zeros)["logits"])
    some = Source(prompt=zeros.prompt | {"block_ids": source.prompt["block_ids"]}, later=zeros.later)
    close(state.logits(1), bench.reference.run(PROMPTS[0], some)["logits"])
    for row, expected in ((0, zeros), (1, some)):
        state.start(row, SamplingParams(), np.zeros(0, np.int64), 5)
        assert state.decode(5)[row].tokens == bench.reference.greedy(PROMPTS[0], expected, 5)
    # What a start gave does not outlive the next prefill.
    state.truncate(0, 0)
    bench.prefill(state, 0, PROMPTS[0], None)
    state.start(0, SamplingParams(), np.zeros(0, np.int64), 5, source.later)
    state.truncate(0, 5)
    bench.prefill(state, 0, [9], None)
    state.start(0, SamplingParams(), np.zeros(0, np.int64), 6)
    longer = Source(
        {}, {name: np.concatenate([array, np.zeros_like(array[:1])]) for name, array in zeros.prompt.items()}, zeros.later
    )
    assert state.decode(4)[0].tokens == bench.reference.greedy([*PROMPTS[0], 9], longer, 4)
    state.truncate(0, 5)
    bench.prefill(state, 0, [9], None)
    state.start(0, SamplingParams(), np.zeros(0, np.int64), 6, source.later)
    state.truncate(0, 5)
    bench.prefill(state, 0, [9], None)
    state.push(0, 10)
    close(state.logits(0), bench.reference.run([*PROMPTS[0], 9, 10], longer)["logits"])


def test_blocks_are_not_split_by_the_prefill_chunk(make) -> None:
    bench = make(Toy(blocks=True), EngineOptions(1, False, 2))
    source = Source(prompt={"block_ids": np.array([0, 1, 1, 1, 1], np.int64)})
    state = bench.decoder.allocate(1, 32)
    bench.prefill(state, 0, PROMPTS[0], source.prompt)
    close(state.logits(0), bench.reference.run(PROMPTS[0], source)["logits"])


@pytest.mark.parametrize("toy", [TOYS["masks and features per token"], TOYS["recurrent and cached"]], ids=["tokens", "recurrent"])
def test_prefill_chunk_changes_nothing(make, toy) -> None:
    whole, parts = make(toy), make(toy, EngineOptions(1, False, 3))
    states = [bench.filled() for bench in (whole, parts)]
    for row in range(3):
        close(states[1].logits(row), states[0].logits(row))
    assert [row.tokens for row in states[1].decode(5)] == [whole.expected(row, 5) for row in range(3)]


def test_copy_of_a_prefix(bench) -> None:
    source = bench.source(2)
    state, target = bench.decoder.allocate(2, 48), bench.decoder.allocate(2, 40)
    whole = len(PROMPTS[2])
    bench.bind(state, 1, source)
    bench.prefill(state, 1, PROMPTS[2], source.prompt)
    if source.bound:
        with pytest.raises(ValueError, match="not bound"):
            target.copy_prefix(0, state, 1, whole)
    bench.bind(target, 0, source)
    bench.bind(state, 0, source)
    length = whole if bench.toy.recurrent else 8
    if bench.toy.recurrent:
        with pytest.raises(ValueError, match="recurrent state can only be copied whole"):
            target.copy_prefix(0, state, 1, 8)
    rest = [44, 45, *PROMPTS[2][:3]]
    values = {name: np.concatenate([array[:2], array[:3]]) for name, array in source.prompt.items()}
    for copy in (target, state):
        copy.copy_prefix(0, state, 1, length)
        assert copy.lengths[0] == length
        bench.prefill(copy, 0, rest, values)
        joined = Source(
            source.bound, {name: np.concatenate([array[:length], values[name]]) for name, array in source.prompt.items()}
        )
        joined.later = source.later
        expected = bench.reference
        if bench.toy.blocks:
            # Blocks of two calls have nothing to do with each other.
            joined.prompt["block_ids"][length:] += 100 * (joined.prompt["block_ids"][length:] > 0)
        close(copy.logits(0), expected.run([*PROMPTS[2][:length], *rest], joined)["logits"])


def test_recurrent_rows_cannot_be_shortened(make) -> None:
    bench = make(TOYS["recurrent and cached"])
    state = bench.filled()
    with pytest.raises(ValueError, match="recurrent state cannot be truncated to 3 of 5 entries, only to 0"):
        state.truncate(0, 3)
    assert state.lengths[0] == 5
    state.truncate(0, 0)
    assert state.lengths[0] == 0


def test_capacity_counts_tokens_without_a_cache(make) -> None:
    bench = make(TOYS["recurrent, no cache"])
    state = bench.decoder.allocate(1, 7)
    bench.bind(state, 0, bench.source(0))
    with pytest.raises(ContextLengthError, match="needs 13 more entries"):
        bench.prefill(state, 0, PROMPTS[2], None)
    bench.prefill(state, 0, PROMPTS[0], bench.source(0).prompt)
    bench.start(state, 0, PROMPTS[0], bench.source(0))
    assert state.decode(10)[0].tokens == bench.expected(0, 3)
    with pytest.raises(ContextLengthError, match="fills the KV cache"):
        state.decode(1)
    with pytest.raises(ContextLengthError, match="fills the KV cache"):
        state.step(np.array([1]))
