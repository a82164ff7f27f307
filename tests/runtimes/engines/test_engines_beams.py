"""Rows whose tokens are chosen outside, on both engines: steps, rows that trade places, further outputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from toy_bench import ENTRIES, PROMPTS, TOYS, close
from toy_reference import Source, random_source

from vlm_edge_runtime.engines import EngineOptions, SamplingParams
from vlm_edge_runtime.errors import DeviceError


def test_step_is_decode(bench) -> None:
    expected = [bench.expected(row, 6) for row in range(3)]
    state = bench.filled()
    logits = np.stack([state.logits(row) for row in range(3)])
    steps: list[np.ndarray] = []
    for _ in range(5):
        steps.append(logits.argmax(axis=-1))
        logits = state.step(steps[-1])
        assert logits.shape == (3, bench.toy.vocab) and logits.dtype == np.float32
    assert np.stack(steps, axis=1).tolist() == [tokens[:5] for tokens in expected]
    assert state.lengths == [len(prompt) + 5 for prompt in PROMPTS]
    assert [row.tokens for row in state.decode(1)] == [tokens[5:] for tokens in expected]  # goes on from the stepped tokens


def test_step_replaces_pending_tokens(bench) -> None:
    state = bench.filled()
    state.decode(2)
    logits = state.step(np.array([40, 41, 42]))
    for row, prompt in enumerate(PROMPTS):
        sequence = [*prompt, bench.expected(row, 1)[0], 40 + row]
        close(logits[row], bench.reference.run(sequence, bench.source(row))["logits"])
        np.testing.assert_array_equal(logits[row], state.logits(row))


@pytest.mark.parametrize("sources", [[1, 2, 0], [2, 1, 0], [0, 0, 0], [1, 0, 0], [2, 2, 1], [0, 1, 2], [1, 1, 2]])
def test_reorder(bench, sources) -> None:
    prompts = [[3, 5, 7, 11], [2, 4], [20, 21, 22]]
    shared = bench.source(0)  # beams: every row reads the same arrays
    state = bench.decoder.allocate(3, 32)
    for row, prompt in enumerate(prompts):
        own = random_source(bench.toy, ENTRIES[0], len(prompt), seed=row)
        bench.bind(state, row, shared)
        bench.prefill(state, row, prompt, own.prompt)
        state.start(row, SamplingParams(), np.array(prompt, np.int64), len(prompt), own.later)
    tokens = np.array([30, 31, 32])
    after = state.step(tokens)
    outputs = [state.outputs(row) for row in range(3)]
    lengths = state.lengths
    state.reorder(sources)
    assert state.lengths == [lengths[source] for source in sources]
    for row, source in enumerate(sources):
        np.testing.assert_array_equal(state.logits(row), after[source])
        for name, array in outputs[source].items():
            np.testing.assert_array_equal(state.outputs(row)[name], array)
    last = state.step(np.array([50, 51, 52]))
    for row, source in enumerate(sources):
        own = random_source(bench.toy, ENTRIES[0], len(prompts[source]), seed=source)
        own.bound = shared.bound
        close(last[row], bench.reference.run([*prompts[source], 30 + source, 50 + row], own)["logits"])


def test_reorder_takes_pending_tokens_along(bench) -> None:
    state = bench.decoder.allocate(3, 32)
    source = bench.source(0)
    for row in range(3):
        bench.fill(state, row, PROMPTS[0], source)
    first = bench.expected(0, 1)
    for row, token in enumerate([7, 8, 9]):
        state.push(row, token)
    state.reorder([2, 0, 0])
    for row, token in enumerate([9, 7, 7]):
        close(state.logits(row), bench.reference.run([*PROMPTS[0], token], source)["logits"])
    assert bench.expected(0, 1) == first


def test_further_outputs_of_the_newest_token(bench) -> None:
    state = bench.filled()
    names = {"attentions"} if bench.toy.cross else set()
    for row, prompt in enumerate(PROMPTS):
        expected = bench.reference.run(prompt, bench.source(row))
        outputs = state.outputs(row)
        assert outputs.keys() == names
        if names:
            assert outputs["attentions"].shape == (ENTRIES[row],)
            close(outputs["attentions"], expected["attentions"])
    state.step(np.array([30, 31, 32]))
    state.push(1, 33)  # runs when it is asked for
    for row, prompt in enumerate(PROMPTS):
        sequence = [*prompt, 30 + row, *([33] if row == 1 else [])]
        expected = bench.reference.run(sequence, bench.source(row))
        for name, array in state.outputs(row).items():
            close(array, expected[name])
    state.truncate(0, 0)
    with pytest.raises(ValueError, match="no logits: prefill it first"):
        state.outputs(0)


def test_idle_rows_keep_what_they_hold(bench) -> None:
    expected = [bench.expected(row, 8) for row in range(3)]
    stop = [SamplingParams(eos_token_ids=(expected[0][2],)), SamplingParams(), SamplingParams()]
    state = bench.decoder.allocate(3, 48)
    for row, prompt in enumerate(PROMPTS):
        bench.fill(state, row, prompt, bench.source(row), stop[row])
    first = expected[0].index(expected[0][2]) + 1
    produced = state.decode(8)
    assert [row.tokens for row in produced] == [expected[0][:first], expected[1], expected[2]]
    before = state.outputs(0)
    for name, array in before.items():
        np.testing.assert_array_equal(state.outputs(0)[name], array)
    state.push(0, expected[0][first - 1])
    assert state.decode(1)[0].tokens == [expected[0][first]]


def test_cancel_and_close(bench) -> None:
    state = bench.filled()
    state.cancel()
    assert [row.tokens for row in state.decode(3)] == [[], [], []]
    state.step(np.array([1, 2, 3]))  # one step is never cut short
    state.close()
    for call in (
        lambda: state.bind(0, {}),
        lambda: state.step(np.array([1, 2, 3])),
        lambda: state.reorder([0, 1, 2]),
        lambda: state.outputs(0),
    ):
        with pytest.raises(DeviceError, match="closed"):
            call()


def test_steps_and_orders_that_do_not_fit_are_refused(make) -> None:
    bench = make(TOYS["cross-attention"])
    state = bench.filled()
    before = [state.logits(row) for row in range(3)]
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: state.step(np.array([1, 2])), r"tokens has the shape \(2,\), expected \(3,\)"),
        (lambda: state.step(np.array([1, 2, 61])), "token 61 is outside the vocabulary of 61"),
        (lambda: state.step(np.array([1, -2, 3])), "token -2 is outside"),
        (lambda: state.reorder([0, 1]), "2 sources for 3 rows"),
        (lambda: state.reorder([0, 1, 3]), "row 3 is outside the batch of 3"),
        (lambda: state.reorder([0, 0, 0]), "rows 1 and 0 are bound to inputs of unlike shapes"),
        (lambda: state.outputs(3), "row 3 is outside"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    for row in range(3):
        np.testing.assert_array_equal(state.logits(row), before[row])
    state.truncate(1, 1)
    with pytest.raises(ValueError, match="row 1 was not started: step runs every row"):
        state.step(np.array([1, 2, 3]))
    assert state.lengths == [5, 1, 13]


def test_a_failed_run_leaves_the_row_as_it_was(make) -> None:
    bench = make(TOYS["recurrent and cached"], EngineOptions(1, False, 2))
    state = bench.filled()
    source = bench.source(0)
    beyond = np.array([5, 6, 5000], np.int64)  # the table of positions has 256
    rest = {name: array[:3] for name, array in source.prompt.items()}
    with pytest.raises(DeviceError, match="graph 'decoder'"):
        state.prefill(0, bench.decoder.embed(np.array([8, 9, 10], np.int64)), beyond, rest)
    assert state.lengths == [5, 2, 13]
    bench.prefill(state, 0, [8, 9, 10], rest)
    joined = Source(
        source.bound, {name: np.concatenate([array, array[:3]]) for name, array in source.prompt.items()}, source.later
    )
    close(state.logits(0), bench.reference.run([*PROMPTS[0], 8, 9, 10], joined)["logits"])
    state.start(0, SamplingParams(), np.zeros(0, np.int64), 5000, source.later)
    with pytest.raises(DeviceError, match="graph 'decoder'"):
        state.step(np.array([1, 2, 3]))
    assert state.lengths == [8, 2, 13]
    state.truncate(0, 0)
    bench.fill(state, 0, PROMPTS[0], source)
    logits = state.step(np.array([1, 2, 3]))
    for row, prompt in enumerate(PROMPTS):
        close(logits[row], bench.reference.run([*prompt, 1 + row], bench.source(row))["logits"])


def test_a_failed_step_leaves_what_was_pending(make) -> None:
    bench = make(TOYS["cross-attention"])
    expected = [bench.expected(row, 4) for row in range(3)]
    state = bench.filled()
    bench.start(state, 1, PROMPTS[1], bench.source(1), SamplingParams(eos_token_ids=(expected[1][0],)))
    state.decode(2)
    state.start(0, SamplingParams(), np.zeros(0, np.int64), 5000)
    with pytest.raises(DeviceError, match="graph 'decoder'"):
        state.step(np.array([1, 2, 3]))
    state.start(0, SamplingParams(), np.zeros(0, np.int64), len(PROMPTS[0]) + 1)
    produced = state.decode(2)
    assert [row.tokens for row in produced] == [expected[0][2:], [], expected[2][2:]]
    assert produced[1].finished
