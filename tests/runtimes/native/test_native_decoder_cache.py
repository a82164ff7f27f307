"""The cache of the C loop: prefixes, capacity, memory."""

from __future__ import annotations

import gc
import os
import time

import psutil
import pytest
from toy_decoder import Toy
from toy_pair import PROMPTS, Pair

from vlm_edge_runtime.engines.base import SamplingParams
from vlm_edge_runtime.errors import ContextLengthError, DeviceError


@pytest.fixture(scope="module", name="one")
def _one() -> Pair:
    return Pair(Toy())


def test_prefix_is_reused_after_truncate(one) -> None:
    state = one.state()
    one.fill(state, 0, PROMPTS[2])
    one.start(state, 0, PROMPTS[2], SamplingParams())
    state.decode(8)
    state.truncate(0, 10)
    assert state.lengths == [10]
    prompt = [*PROMPTS[2][:10], 50, 51, 52]
    one.fill(state, 0, prompt[10:])
    one.start(state, 0, prompt, SamplingParams())
    assert state.decode(8)[0][0] == one.expected(prompt, 8, SamplingParams())


def test_prefix_is_copied_between_rows_and_states(one) -> None:
    source = one.state(batch=2, capacity=48)
    one.fill(source, 1, PROMPTS[2])
    target = one.state(batch=3, capacity=100)
    target.copy_prefix(2, source, 1, 12)
    target.copy_prefix(0, target, 2, 9)
    assert target.lengths == [9, 0, 12]
    source.close()
    for row, kept in ((2, 12), (0, 9)):
        prompt = [*PROMPTS[2][:kept], 1, 2, 3]
        one.fill(target, row, prompt[kept:])
        one.start(target, row, prompt, SamplingParams())
        assert target.decode(6)[row][0] == one.expected(prompt, 6, SamplingParams())
        target.truncate(row, 0)


def test_full_cache_is_refused_before_anything_runs(one) -> None:
    state = one.state(capacity=10)
    with pytest.raises(ContextLengthError, match="needs 21 more entries, the KV cache has 10 left"):
        one.fill(state, 0, PROMPTS[2])
    assert state.lengths == [0]
    one.fill(state, 0, PROMPTS[0])
    one.start(state, 0, PROMPTS[0], SamplingParams())
    ((tokens, *_),) = state.decode(50)
    assert tokens == one.expected(PROMPTS[0], 4, SamplingParams())  # 3 free entries, and one token that needs none yet
    assert state.lengths == [10]
    for call in (lambda: state.decode(1), lambda: one.fill(state, 0, [1])):
        with pytest.raises(ContextLengthError):
            call()
    state.push(0, 5)
    with pytest.raises(ContextLengthError):
        state.logits(0)


def test_a_fixed_capacity_in_the_graph_is_used_to_the_last_entry() -> None:
    pair = Pair(Toy(capacity=9))
    with pytest.raises(DeviceError, match="cache of 9 entries, asked for were 10"):
        pair.state(capacity=10)
    state = pair.state(batch=2, capacity=9)
    for row, prompt in enumerate([PROMPTS[0], PROMPTS[1]]):
        pair.fill(state, row, prompt)
        pair.start(state, row, prompt, SamplingParams())
    first = state.decode(20)
    assert [len(row[0]) for row in first] == [3, 3]
    state.truncate(0, 9)  # full, idle, and unharmed by its neighbour
    assert state.decode(2)[1][0] == pair.expected(PROMPTS[1], 5, SamplingParams())[3:]


def test_memory_that_cannot_be_had_is_an_error(one) -> None:
    with pytest.raises(DeviceError, match=r"no memory for a KV cache|address space"):
        one.state(batch=1024, capacity=2**31 - 2)


@pytest.mark.skipif(
    "VLM_EDGE_SANITIZED" in os.environ, reason="AddressSanitizer keeps freed memory and touches what is allocated"
)
def test_cache_pages_are_taken_only_when_written(one) -> None:
    before = psutil.Process().memory_info().rss
    state = one.state(batch=8, capacity=1_000_000)
    assert state.kv_bytes == 8 * 1_000_000 * 2 * 16 * 4 * 4
    one.fill(state, 5, PROMPTS[0])
    assert psutil.Process().memory_info().rss - before < state.kv_bytes / 20
    state.close()


@pytest.mark.skipif(
    "VLM_EDGE_SANITIZED" in os.environ, reason="AddressSanitizer keeps freed memory and touches what is allocated"
)
def test_memory_is_steady_over_many_states(one) -> None:
    def cycle() -> None:
        state = one.state(batch=2, capacity=256)
        for row in range(2):
            one.fill(state, row, PROMPTS[row])
            one.start(state, row, PROMPTS[row], SamplingParams(temperature=1.0, repetition_penalty=1.1, eos_token_ids=(1, 2)))
        state.decode(6)
        if time.perf_counter_ns() % 2:
            state.close()

    for _ in range(30):
        cycle()
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(200):
        cycle()
    gc.collect()
    # One state holds 256 KiB of cache: 200 leaked ones would be 50 MiB.
    assert psutil.Process().memory_info().rss - before < 8 << 20
