"""The token loop in C, compared token for token with a plain Python loop over the same weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import reference_sampling as reference
from toy_decoder import Toy
from toy_pair import PROMPTS, SAMPLED, Pair, as_array, fields_of

from vlm_edge_runtime import _native
from vlm_edge_runtime.engines.base import SamplingParams
from vlm_edge_runtime.errors import DeviceError

TOYS = {
    "learned positions": Toy(),
    "rotary": Toy(rotary=True),
    "rotary, own positions": Toy(rotary=True, axes=0),
    "m-rope": Toy(axes=3),
}


@pytest.fixture(scope="module", params=TOYS, name="toy")
def _toy(request) -> Toy:
    return TOYS[request.param]


@pytest.fixture(scope="module", name="pair")
def _pair(toy: Toy) -> Pair:
    return Pair(toy)


@pytest.fixture(scope="module", name="one")
def _one() -> Pair:
    return Pair(TOYS["learned positions"])


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("steps_per_call", [1, 5, 40])
def test_one_row(pair, params, steps_per_call) -> None:
    prompt = PROMPTS[0]
    state = pair.state()
    pair.fill(state, 0, prompt)
    pair.start(state, 0, prompt, params)
    tokens: list[int] = []
    while len(tokens) < 12:
        (row,) = state.decode(min(steps_per_call, 12 - len(tokens)))
        tokens += row[0]
    assert tokens == pair.expected(prompt, 12, params)
    assert state.lengths == [len(prompt) + 11]  # the newest token's entry is computed lazily


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
def test_rows_of_different_length_together(pair, params) -> None:
    state = pair.state(batch=3)
    for row, prompt in enumerate(PROMPTS):
        pair.fill(state, row, prompt)
    for row, prompt in enumerate(PROMPTS):
        pair.start(state, row, prompt, SamplingParams(**{**fields_of(params), "seed": row}))
    rows = state.decode(10)
    for row, prompt in enumerate(PROMPTS):
        assert rows[row][0] == pair.expected(prompt, 10, SamplingParams(**{**fields_of(params), "seed": row}))


def test_finished_rows_idle_without_changing(pair) -> None:
    free = [pair.expected(prompt, 11, SamplingParams()) for prompt in PROMPTS]
    eos = [(free[0][2],), (free[1][5], 60), ()]
    expected = [pair.expected(prompt, 10, SamplingParams(eos_token_ids=eos[row])) for row, prompt in enumerate(PROMPTS)]
    state = pair.state(batch=3)
    for row, prompt in enumerate(PROMPTS):
        pair.fill(state, row, prompt)
        pair.start(state, row, prompt, SamplingParams(eos_token_ids=eos[row]))
    rows: list[list[int]] = [[], [], []]
    for _ in range(5):
        for row, (tokens, _, _, finished) in enumerate(state.decode(2)):
            rows[row] += tokens
            assert finished == (rows[row][-1] in eos[row])
    assert rows == expected
    # What an idle row holds must survive its neighbours' steps: pushed its own last token, it goes on as if alone.
    for row in (0, 1):
        state.push(row, rows[row][-1])
        assert state.decode(1)[row][0] == [free[row][len(rows[row])]]


def test_row_between_active_ones_keeps_its_prefill(pair) -> None:
    state = pair.state(batch=3)
    for row, prompt in enumerate(PROMPTS):
        pair.fill(state, row, prompt)
    before = state.logits(1)
    for row in (0, 2):
        pair.start(state, row, PROMPTS[row], SamplingParams())
    state.decode(6)
    assert state.logits(1) == before
    pair.start(state, 1, PROMPTS[1], SamplingParams())
    # Row 1 joins the others in the middle of their texts.
    rows = state.decode(4)
    assert rows[1][0] == pair.expected(PROMPTS[1], 4, SamplingParams())
    assert rows[0][0] == pair.expected(PROMPTS[0], 10, SamplingParams())[6:]
    assert rows[2][0] == pair.expected(PROMPTS[2], 10, SamplingParams())[6:]


@pytest.mark.parametrize("chunk", [1, 4, 5, 20, 21, 100])
def test_prefill_in_chunks(pair, chunk) -> None:
    prompt = PROMPTS[2]
    whole, parts = pair.state(), pair.state(chunk=chunk)
    for state in (whole, parts):
        pair.fill(state, 0, prompt)
    np.testing.assert_allclose(as_array(parts.logits(0)), as_array(whole.logits(0)), atol=1e-4)
    pair.start(parts, 0, prompt, SamplingParams())
    assert parts.decode(8)[0][0] == pair.expected(prompt, 8, SamplingParams())


def test_pushed_tokens_replace_the_model_s(one) -> None:
    state = one.state()
    one.fill(state, 0, PROMPTS[0])
    first = one.expected(PROMPTS[0], 1, SamplingParams())[0]
    assert int(as_array(state.logits(0)).argmax()) == first
    state.push(0, 42)
    assert int(as_array(state.logits(0)).argmax()) == one.expected([*PROMPTS[0], 42], 1, SamplingParams())[0]
    one.start(state, 0, [*PROMPTS[0], 42], SamplingParams())
    state.decode(1)
    state.push(0, 33)  # instead of what was just sampled
    assert state.decode(1)[0][0] == one.expected([*PROMPTS[0], 42, 33], 1, SamplingParams())
    assert state.lengths == [len(PROMPTS[0]) + 2]


def test_log_probabilities(one) -> None:
    state = one.state()
    one.fill(state, 0, PROMPTS[0])
    expected = reference.log_softmax(as_array(state.logits(0)))
    one.start(state, 0, PROMPTS[0], SamplingParams(temperature=1.0, seed=5, logprobs=3))
    ((tokens, logprobs, top, finished),) = state.decode(4)
    assert len(tokens) == len(logprobs) == len(top) == 4 and not finished
    assert logprobs[0] == pytest.approx(expected[tokens[0]], rel=1e-9)
    assert [token for token, _ in top[0]] == np.argsort(-expected, kind="stable")[:3].tolist()
    one.start(state, 0, [], SamplingParams(logprobs=0))
    ((tokens, logprobs, top, _),) = state.decode(2)
    assert len(logprobs) == 2 and top == []
    one.start(state, 0, [], SamplingParams())
    assert state.decode(1)[0][1:3] == ([], [])


def test_same_seed_same_text_whatever_the_neighbours(one) -> None:
    alone = one.state()
    one.fill(alone, 0, PROMPTS[1])
    one.start(alone, 0, PROMPTS[1], SAMPLED)
    text = alone.decode(8)[0][0]
    crowd = one.state(batch=4)
    for row in range(4):
        one.fill(crowd, row, PROMPTS[1] if row == 2 else PROMPTS[0])
        one.start(crowd, row, PROMPTS[1] if row == 2 else PROMPTS[0], SAMPLED if row == 2 else SamplingParams())
    assert crowd.decode(8)[2][0] == text


def test_nan_from_the_graph_is_an_error() -> None:
    pair = Pair(Toy(nan_token=8))
    state = pair.state()
    pair.fill(state, 0, [1, 2, 3])
    state.push(0, 8)
    pair.start(state, 0, [], SamplingParams())
    with pytest.raises(DeviceError, match=r"graph 'decoder' computed logits that contain NaN \(row 0, entry 4\)"):
        state.decode(3)


def test_misuse_is_refused(one) -> None:
    state = one.state(batch=2)
    embeds, positions = one.embed([1, 2]), one.positions(0, 2)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: state.prefill(2, embeds, positions), "row 2 is outside the batch of 2"),
        (lambda: state.prefill(-1, embeds, positions), "row -1"),
        (lambda: state.prefill(0, embeds[:, :5].copy(), positions), "5 wide, the decoder takes 32"),
        (lambda: state.prefill(0, embeds, positions[:1]), "1 positions for 2 embeddings"),
        (lambda: state.prefill(0, embeds[:0], positions[:0]), "nothing to prefill"),
        (lambda: state.logits(0), "prefill it first"),
        (lambda: state.push(0, 1), "prefill it before push"),
        (lambda: one.start(state, 0, [], SamplingParams()), "prefill it before start"),
        (lambda: state.truncate(0, 1), "cannot be truncated to 1"),
        (lambda: state.truncate(0, -1), "length is -1"),
        (lambda: state.decode(0), "max_steps is 0"),
        (lambda: state.copy_prefix(0, state, 1, 3), "has 0 entries, 3 were asked for"),
        (lambda: one.state(batch=0), "batch 0"),
        (lambda: one.state(capacity=2**31), "capacity"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert state.decode(3) == [([], [], [], False)] * 2  # nothing was started
    one.fill(state, 0, [1])
    with pytest.raises(ValueError, match="outside the vocabulary of 61"):
        state.push(0, 61)
    with pytest.raises(ValueError, match="top_p"):
        one.start(state, 0, [], SamplingParams(top_p=0))
    with pytest.raises(ValueError, match="another decoder"):
        state.copy_prefix(0, Pair(Toy()).state(), 0, 0)
    with pytest.raises(TypeError, match="float64, expected float32"):
        state.prefill(0, embeds.astype(np.float64), positions)


def test_own_positions_cannot_be_overruled() -> None:
    pair = Pair(TOYS["rotary, own positions"])
    state = pair.state()
    with pytest.raises(ValueError, match="counts positions itself"):
        state.prefill(0, pair.embed([1, 2]), np.array([3, 4], np.int64))
    pair.fill(state, 0, [1, 2])
    with pytest.raises(ValueError, match="counts positions itself"):
        state.start(0, SamplingParams(), np.zeros(0, np.int64), 7)


def test_graphs_that_are_no_decoder_are_refused(one) -> None:
    portable = _native.Session(Toy().portable_model(), "decoder")
    with pytest.raises(DeviceError, match="has an input 'attention_mask'"):
        _native.DecoderState(portable, one.embed_tokens, 1, 8)
    with pytest.raises(DeviceError, match="graph 'decoder' is not an embedding"):
        _native.DecoderState(one.decoder, one.decoder, 1, 8)
    narrow = _native.Session(Toy(hidden=16).embed_model(), "embed_tokens")
    with pytest.raises(DeviceError, match="of width 16, graph 'decoder' takes 32"):
        _native.DecoderState(one.decoder, narrow, 1, 8)
    with pytest.raises(TypeError):
        _native.DecoderState(object(), one.embed_tokens, 1, 8)  # type: ignore[arg-type]


def test_times_of_each_run(one) -> None:
    state = one.state()
    one.fill(state, 0, PROMPTS[0])
    one.start(state, 0, PROMPTS[0], SamplingParams())
    state.decode(5)
    embed, decoder = state.take_times()
    assert (len(embed), len(decoder)) == (4, 5) and min(decoder) > 0
    assert state.take_times() == ([], [])
