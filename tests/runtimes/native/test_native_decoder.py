"""The token loop in C, compared token for token with a plain Python loop over the same weights."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import psutil
import pytest
import reference_sampling as reference
from toy_decoder import Toy

from vlm_edge_runtime import _native
from vlm_edge_runtime.engines.base import SamplingParams
from vlm_edge_runtime.engines.ort_library import ensure_runtime
from vlm_edge_runtime.errors import ContextLengthError, DeviceError

TOYS = {
    "learned positions": Toy(),
    "rotary": Toy(rotary=True),
    "rotary, own positions": Toy(rotary=True, axes=0),
    "m-rope": Toy(axes=3),
}
PROMPTS = [[3, 5, 7, 11, 13, 17, 19], [2, 4], list(range(20, 41))]
SAMPLED = SamplingParams(temperature=0.9, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.15)


@pytest.fixture(scope="module", params=TOYS, name="toy")
def _toy(request) -> Toy:
    return TOYS[request.param]


class Pair:
    """Both sessions of a toy, and a plain Python loop over its portable form."""

    def __init__(self, toy: Toy) -> None:
        ensure_runtime()
        self.toy = toy
        self.decoder = _native.Session(toy.lowered_model(), "decoder")
        self.embed_tokens = _native.Session(toy.embed_model(), "embed_tokens")
        # The portable form wants position_ids even where the lowered one counts by itself.
        self.twin = Toy(rotary=toy.rotary, axes=toy.axes or 1)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.portable = ort.InferenceSession(self.twin.portable_model(), options, providers=["CPUExecutionProvider"])

    def state(self, batch: int = 1, capacity: int = 64, chunk: int = 0) -> _native.DecoderState:
        return _native.DecoderState(self.decoder, self.embed_tokens, batch, capacity, chunk)

    def embed(self, tokens: list[int]) -> np.ndarray:
        return np.asarray(self.embed_tokens.run({"input_ids": np.array([tokens], np.int64)})["inputs_embeds"])[0]

    def positions(self, first: int, count: int) -> np.ndarray:
        line = np.arange(first, first + count, dtype=np.int64)
        # The axes of M-RoPE differ inside an image; the largest of them leads.
        return np.stack([line, line // 2, line // 3]) if self.toy.axes == 3 else line

    def fill(self, state: _native.DecoderState, row: int, tokens: list[int]) -> None:
        state.prefill(row, self.embed(tokens), self.positions(state.lengths[row], len(tokens)))

    def start(self, state: _native.DecoderState, row: int, prompt: list[int], params: SamplingParams) -> None:
        state.start(row, params, np.array(prompt, np.int64), len(prompt))

    def expected(self, prompt: list[int], steps: int, params: SamplingParams) -> list[int]:
        """Re-runs the whole sequence for every token, without any cache."""
        tokens, generated = list(prompt), []
        empty = {name: np.zeros((1, self.toy.kv_heads, 0, self.toy.size), np.float32) for name in self.toy.past_names}
        for step in range(steps):
            positions = self.positions(0, len(prompt))
            later = np.arange(len(prompt), len(tokens), dtype=np.int64)
            positions = np.concatenate([positions, np.broadcast_to(later, (*positions.shape[:-1], len(later)))], axis=-1)
            feeds = {"inputs_embeds": self.embed(tokens)[None], "attention_mask": np.ones((1, len(tokens)), np.int64), **empty}
            feeds["position_ids"] = positions[..., None, :]
            logits = self.portable.run(["logits"], feeds)[0][0, -1]
            token = reference.choose(logits, params, prompt + generated, step)
            generated.append(token)
            tokens.append(token)
            if token in params.eos_token_ids:
                break
        return generated


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
        pair.start(state, row, prompt, SamplingParams(**{**_fields(params), "seed": row}))
    rows = state.decode(10)
    for row, prompt in enumerate(PROMPTS):
        assert rows[row][0] == pair.expected(prompt, 10, SamplingParams(**{**_fields(params), "seed": row}))


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
    np.testing.assert_allclose(_array(parts.logits(0)), _array(whole.logits(0)), atol=1e-4)
    pair.start(parts, 0, prompt, SamplingParams())
    assert parts.decode(8)[0][0] == pair.expected(prompt, 8, SamplingParams())


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


def test_pushed_tokens_replace_the_model_s(one) -> None:
    state = one.state()
    one.fill(state, 0, PROMPTS[0])
    first = one.expected(PROMPTS[0], 1, SamplingParams())[0]
    assert int(_array(state.logits(0)).argmax()) == first
    state.push(0, 42)
    assert int(_array(state.logits(0)).argmax()) == one.expected([*PROMPTS[0], 42], 1, SamplingParams())[0]
    one.start(state, 0, [*PROMPTS[0], 42], SamplingParams())
    state.decode(1)
    state.push(0, 33)  # instead of what was just sampled
    assert state.decode(1)[0][0] == one.expected([*PROMPTS[0], 42, 33], 1, SamplingParams())
    assert state.lengths == [len(PROMPTS[0]) + 2]


def test_log_probabilities(one) -> None:
    state = one.state()
    one.fill(state, 0, PROMPTS[0])
    expected = reference.log_softmax(_array(state.logits(0)))
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


def test_memory_that_cannot_be_had_is_an_error(one) -> None:
    with pytest.raises(DeviceError, match=r"no memory for a KV cache|address space"):
        one.state(batch=1024, capacity=2**31 - 2)


class Long:
    """A decode call of many steps, running in a thread."""

    steps = 3000

    def __init__(self) -> None:
        self.pair = Pair(Toy(hidden=256, vocab=4000, positions=4096))
        self.state = self.pair.state(capacity=4000)
        self.pair.fill(self.state, 0, [1, 2])
        self.pair.start(self.state, 0, [], SamplingParams())
        self.rows: list[tuple] = []
        self._thread = threading.Thread(target=lambda: self.rows.extend(self.state.decode(self.steps)))
        self._thread.start()

    def meet(self) -> None:
        """Returns once the call is seen running: a second thread is refused then."""
        while self._thread.is_alive():
            try:
                _ = self.state.lengths
            except DeviceError as error:
                assert "in use by another thread" in str(error)
                return
        pytest.fail("the call ended before it was seen running")

    def tokens(self) -> list[int]:
        self._thread.join()
        return self.rows[0][0]


def test_cancel_from_another_thread() -> None:
    long = Long()
    long.meet()
    long.state.cancel()
    assert len(long.tokens()) < long.steps
    assert long.state.decode(100)[0][0] == []  # stays cancelled …
    long.pair.start(long.state, 0, [], SamplingParams())
    assert len(long.state.decode(5)[0][0]) == 5  # … until the next start


def test_close_from_another_thread_waits_for_the_running_call() -> None:
    long = Long()
    long.meet()
    long.state.close()
    assert len(long.tokens()) < long.steps
    with pytest.raises(DeviceError, match="closed"):
        long.state.decode(1)


def test_use_after_close_is_an_error(one) -> None:
    state = one.state()
    one.fill(state, 0, [1])
    state.close()
    state.close()
    state.cancel()
    calls: list[Callable[[], object]] = [
        lambda: state.lengths,
        lambda: state.logits(0),
        lambda: state.decode(1),
        lambda: state.push(0, 1),
        lambda: state.truncate(0, 0),
        lambda: state.take_times(),
        lambda: state.kv_bytes,
        lambda: one.start(state, 0, [], SamplingParams()),
    ]
    for call in calls:
        with pytest.raises(DeviceError, match="closed"):
            call()
    other = one.state()
    for source, target in ((state, other), (other, state)):
        with pytest.raises(DeviceError, match="closed"):
            target.copy_prefix(0, source, 0, 0)


def test_state_keeps_closed_sessions_alive() -> None:
    pair = Pair(Toy())
    state = pair.state()
    pair.fill(state, 0, PROMPTS[0])
    expected = pair.expected(PROMPTS[0], 5, SamplingParams())
    pair.start(state, 0, PROMPTS[0], SamplingParams())
    pair.decoder.close()
    pair.embed_tokens.close()
    assert state.decode(5)[0][0] == expected
    with pytest.raises(DeviceError, match="closed"):
        pair.state()


def test_times_of_each_run(one) -> None:
    state = one.state()
    one.fill(state, 0, PROMPTS[0])
    one.start(state, 0, PROMPTS[0], SamplingParams())
    state.decode(5)
    embed, decoder = state.take_times()
    assert (len(embed), len(decoder)) == (4, 5) and min(decoder) > 0
    assert state.take_times() == ([], [])


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


def _array(logits: bytes) -> np.ndarray:
    return np.frombuffer(logits, np.float32)


def _fields(params: SamplingParams) -> dict[str, object]:
    return {name: getattr(params, name) for name in SamplingParams.__slots__}
