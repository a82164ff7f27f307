"""What a decoder reads besides its tokens, on both engines, against numpy: sources, masks, features, blocks, recurrent state."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from toy_bundle import toy_bundle
from toy_decoder import Toy
from toy_reference import Reference, Source, random_source

from vlm_edge_runtime.engines import EngineOptions, SamplingParams, open_engine
from vlm_edge_runtime.engines.base import Decoder, DecoderState, Engine
from vlm_edge_runtime.errors import ContextLengthError, DeviceError

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


@pytest.fixture(scope="module", params=["portable", "lowered"], name="make")
def _make(request, tmp_path_factory) -> Callable[..., Bench]:
    benches: dict[str, Bench] = {}

    def make(toy: Toy, options: EngineOptions = OPTIONS) -> Bench:
        key = repr((toy.__class__.__name__, [getattr(toy, name) for name in toy.__slots__ if name[0] != "_"], options))
        if key not in benches:
            bundle = toy_bundle(tmp_path_factory.mktemp("toy"), toy, request.param if request.param == "lowered" else None)
            benches[key] = Bench(open_engine(bundle, "cpu", options), toy)
        return benches[key]

    return make


@pytest.fixture(params=TOYS, name="bench")
def _bench(request, make) -> Bench:
    return make(TOYS[request.param])


def _close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)


def test_rows_decode_together_exactly_as_alone(bench) -> None:
    expected = [bench.expected(row, 8) for row in range(3)]
    state = bench.filled()
    for row, prompt in enumerate(PROMPTS):
        _close(state.logits(row), bench.reference.run(prompt, bench.source(row))["logits"])
    together: list[list[int]] = [[], [], []]
    for steps in (1, 3, 4):
        for row, produced in enumerate(state.decode(steps)):
            together[row] += produced.tokens
    assert together == expected
    for row, prompt in enumerate(PROMPTS):
        sequence = [*prompt, *expected[row][:7]]
        _close(state.logits(row), bench.reference.run(sequence, bench.source(row))["logits"])
    alone = bench.decoder.allocate(1, 48)
    bench.fill(alone, 0, PROMPTS[1], bench.source(1))
    assert alone.decode(8)[0].tokens == expected[1]


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
        _close(logits[row], bench.reference.run(sequence, bench.source(row))["logits"])
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
        _close(last[row], bench.reference.run([*prompts[source], 30 + source, 50 + row], own)["logits"])


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
        _close(state.logits(row), bench.reference.run([*PROMPTS[0], token], source)["logits"])
    assert bench.expected(0, 1) == first


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


def test_further_outputs_of_the_newest_token(bench) -> None:
    state = bench.filled()
    names = {"attentions"} if bench.toy.cross else set()
    for row, prompt in enumerate(PROMPTS):
        expected = bench.reference.run(prompt, bench.source(row))
        outputs = state.outputs(row)
        assert outputs.keys() == names
        if names:
            assert outputs["attentions"].shape == (ENTRIES[row],)
            _close(outputs["attentions"], expected["attentions"])
    state.step(np.array([30, 31, 32]))
    state.push(1, 33)  # runs when it is asked for
    for row, prompt in enumerate(PROMPTS):
        sequence = [*prompt, 30 + row, *([33] if row == 1 else [])]
        expected = bench.reference.run(sequence, bench.source(row))
        for name, array in state.outputs(row).items():
            _close(array, expected[name])
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


def test_values_per_token_that_are_not_given_are_zeros(make) -> None:
    bench = make(Toy(feature=True, blocks=True))
    source = bench.source(0)
    zeros = Source(prompt={"deepstack.0": np.zeros((5, 32), np.float32), "block_ids": np.zeros(5, np.int64)})
    zeros.later = {"deepstack.0": np.zeros(32, np.float32)}
    state = bench.decoder.allocate(2, 32)
    bench.prefill(state, 0, PROMPTS[0], None)
    bench.prefill(state, 1, PROMPTS[0], {"block_ids": source.prompt["block_ids"]})
    _close(state.logits(0), bench.reference.run(PROMPTS[0], zeros)["logits"])
    some = Source(prompt=zeros.prompt | {"block_ids": source.prompt["block_ids"]}, later=zeros.later)
    _close(state.logits(1), bench.reference.run(PROMPTS[0], some)["logits"])
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


def test_blocks_are_not_split_by_the_prefill_chunk(make) -> None:
    bench = make(Toy(blocks=True), EngineOptions(1, False, 2))
    source = Source(prompt={"block_ids": np.array([0, 1, 1, 1, 1], np.int64)})
    state = bench.decoder.allocate(1, 32)
    bench.prefill(state, 0, PROMPTS[0], source.prompt)
    _close(state.logits(0), bench.reference.run(PROMPTS[0], source)["logits"])


@pytest.mark.parametrize("toy", [TOYS["masks and features per token"], TOYS["recurrent and cached"]], ids=["tokens", "recurrent"])
def test_prefill_chunk_changes_nothing(make, toy) -> None:
    whole, parts = make(toy), make(toy, EngineOptions(1, False, 3))
    states = [bench.filled() for bench in (whole, parts)]
    for row in range(3):
        _close(states[1].logits(row), states[0].logits(row))
    assert [row.tokens for row in states[1].decode(5)] == [whole.expected(row, 5) for row in range(3)]


def test_an_emptied_row_can_be_bound_anew(bench) -> None:
    state = bench.filled()
    state.decode(3)
    state.truncate(0, 0)
    other = random_source(bench.toy, 14, len(PROMPTS[0]), seed=17)  # a longer one than any before
    bench.fill(state, 0, PROMPTS[0], other)
    produced = state.decode(4)
    assert produced[0].tokens == bench.reference.greedy(PROMPTS[0], other, 4)
    assert [row.tokens for row in produced[1:]] == [bench.expected(row, 7)[3:] for row in (1, 2)]
    if not bench.toy.recurrent:
        return
    state.truncate(1, 0)  # back to the state it was bound to
    bench.prefill(state, 1, PROMPTS[1], bench.source(1).prompt)
    _close(state.logits(1), bench.reference.run(PROMPTS[1], bench.source(1))["logits"])


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
        _close(copy.logits(0), expected.run([*PROMPTS[2][:length], *rest], joined)["logits"])


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


def test_binding_that_does_not_fit_is_refused(make) -> None:
    bench = make(TOYS["recurrent and cached"])
    state = bench.decoder.allocate(2, 16)
    bound = bench.source(0).bound
    wide = bound["cross_key_values.1.value"]
    cases = [
        ({}, "'encoder_attention_mask'.* missing"),
        ({name: array for name, array in bound.items() if name != "state.0"}, "'state.0' is missing: all of a row's inputs"),
        (bound | {"extra": wide}, "no input 'extra' to bind; it takes .*'cross_key_values.0.key'"),
        (
            bound | {"cross_key_values.1.value": wide[:, :3]},
            r"cross_key_values.1.value has size 3 in dimension 1 \(source\), expected 4",
        ),
        (bound | {"cross_key_values.1.value": wide[:, :, :5]}, r"has size 5 in dimension 2 \(16\), expected 16"),
        (bound | {"cross_key_values.1.value": wide[None]}, r"has 4 dimensions, expected 3: \[4, source, 16\]"),
        (bound | {"state.0": np.zeros(31, np.float32)}, "state.0 has size 31"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            state.bind(0, given)
    with pytest.raises(TypeError, match="encoder_attention_mask is float32, expected int64"):
        state.bind(0, bound | {"encoder_attention_mask": bound["encoder_attention_mask"].astype(np.float32)})
    with pytest.raises(ValueError, match="row 2 is outside the batch of 2"):
        state.bind(2, bound)
    with pytest.raises(ValueError, match="row 0 is not bound"):
        bench.prefill(state, 0, PROMPTS[0], None)
    assert state.lengths == [0, 0]
    state.bind(0, bound)
    state.bind(0, bound)
    bench.prefill(state, 0, PROMPTS[0], bench.source(0).prompt)
    with pytest.raises(ValueError, match="row 0 has 5 entries: truncate it to 0"):
        state.bind(0, bound)


def test_values_per_token_that_do_not_fit_are_refused(make) -> None:
    bench = make(TOYS["masks and features per token"])
    state = bench.decoder.allocate(1, 16)
    source = bench.source(0)
    bench.bind(state, 0, source)
    prompt = source.prompt
    cases = [
        ({"block_ids": np.zeros(5, np.int64)}, "no per-token input 'block_ids'; it takes .*'deepstack.0'"),
        (prompt | {"deepstack.0": prompt["deepstack.0"][:4]}, r"deepstack.0 has size 4 in dimension 0 \(5\), expected 5"),
        (
            prompt | {"cross_attention_mask": np.ones((5, 7), np.int64)},
            r"cross_attention_mask has size 7 .*\(source\), expected 4",
        ),
        (prompt | {"deepstack.0": prompt["deepstack.0"][0]}, r"deepstack.0 has 1 dimensions, expected 2: \[5, 32\]"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            bench.prefill(state, 0, PROMPTS[0], given)
    with pytest.raises(TypeError, match=r"deepstack\.0 is float64, expected float32"):
        bench.prefill(state, 0, PROMPTS[0], prompt | {"deepstack.0": prompt["deepstack.0"].astype(np.float64)})
    assert state.lengths == [0]
    bench.prefill(state, 0, PROMPTS[0], prompt)
    for given, message in [
        ({"deepstack.1": source.later["deepstack.0"]}, "no per-token input 'deepstack.1'"),
        ({"deepstack.0": prompt["deepstack.0"]}, r"deepstack.0 has 2 dimensions, expected 1: \[32\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            state.start(0, SamplingParams(), np.zeros(0, np.int64), 5, given)
    with pytest.raises(ValueError, match="no per-token input 'x'; it takes none"):
        plain = make(Toy())
        plain.prefill(plain.decoder.allocate(1, 8), 0, [1], {"x": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="no input 'x' to bind; it takes none"):
        plain.decoder.allocate(1, 8).bind(0, {"x": np.zeros(1, np.float32)})


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


def test_sources_of_unlike_length_need_a_mask(make) -> None:
    bench = make(Toy(cross=True, source_mask=False))
    state = bench.decoder.allocate(2, 32)
    long, short = bench.source(0), bench.source(1)
    state.bind(0, long.bound)
    with pytest.raises(ValueError, match="row 1 has size 8 in 'source', another row has 4: they cannot run together"):
        state.bind(1, short.bound)
    bench.fill(state, 1, PROMPTS[0], long)
    state.truncate(1, 0)
    state.truncate(0, 0)
    # Row 1's work is over: it does not stand in the way, and loses what it was bound to.
    state.bind(0, long.bound)
    bench.prefill(state, 0, PROMPTS[0], None)
    state.truncate(0, 0)
    bench.fill(state, 1, PROMPTS[1], short)
    assert state.decode(4)[1].tokens == bench.reference.greedy(PROMPTS[1], short, 4)
    with pytest.raises(ValueError, match="row 0 is not bound"):
        bench.prefill(state, 0, PROMPTS[0], None)


def test_binding_holds_until_the_next_one(make) -> None:
    bench = make(TOYS["cross-attention"])
    state = bench.filled()
    for row in range(3):
        state.truncate(row, 0)
    other = random_source(bench.toy, 3, 0, seed=9)
    bench.fill(state, 0, PROMPTS[0], other)
    for row in (1, 2):  # bound before, to sources both longer and shorter than row 0's
        bench.prefill(state, row, PROMPTS[row], None)
        bench.start(state, row, PROMPTS[row], bench.source(row))
    expected = [bench.reference.greedy(PROMPTS[0], other, 4), bench.expected(1, 4), bench.expected(2, 4)]
    assert [row.tokens for row in state.decode(4)] == expected


def test_an_array_that_all_rows_share(make) -> None:
    bench = make(TOYS["no cache at all"])
    state = bench.decoder.allocate(2, 32)
    source = bench.source(0)
    shifted = source.bound | {"shift": source.bound["shift"] + 1}
    state.bind(0, source.bound)
    with pytest.raises(ValueError, match="row 1 has other values of 'shift' than another row, which is one array for all rows"):
        state.bind(1, shifted)
    bench.prefill(state, 0, PROMPTS[0], None)
    with pytest.raises(ValueError, match="other values of 'shift'"):
        state.bind(1, shifted)
    state.truncate(0, 0)
    state.bind(1, shifted)  # row 0's work is over
    bench.prefill(state, 1, PROMPTS[0], None)
    _close(state.logits(1), bench.reference.run(PROMPTS[0], Source(shifted))["logits"])
    with pytest.raises(ValueError, match="row 0 is not bound"):
        bench.prefill(state, 0, PROMPTS[0], None)


def test_images_per_token_must_be_said(make) -> None:
    bench = make(TOYS["images per token"])
    state = bench.decoder.allocate(2, 32)
    source = bench.source(1)
    bench.bind(state, 0, source)
    with pytest.raises(ValueError, match=r"'image_attention_mask'.* must be given: nothing else says how large 'images' is"):
        bench.prefill(state, 0, PROMPTS[1], None)
    bench.prefill(state, 0, PROMPTS[1], source.prompt)
    values = {name: np.ones((1, 4), np.int64) for name in source.prompt}
    with pytest.raises(ValueError, match=r"cross_attention_mask has size 4 in dimension 1 \(source\), expected 8"):
        bench.prefill(state, 0, [1], values)
    with pytest.raises(ValueError, match=r"image_attention_mask has size 5 in dimension 0 \(images\), expected 4"):
        state.start(0, SamplingParams(), np.zeros(0, np.int64), 2, {"image_attention_mask": np.ones(5, np.int64)})
    state.truncate(0, 0)
    bench.bind(state, 0, bench.source(0))
    bench.prefill(state, 0, PROMPTS[0], bench.source(0).prompt)
    _close(state.logits(0), bench.reference.run(PROMPTS[0], bench.source(0))["logits"])


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
    _close(state.logits(0), bench.reference.run([*PROMPTS[0], 8, 9, 10], joined)["logits"])
    state.start(0, SamplingParams(), np.zeros(0, np.int64), 5000, source.later)
    with pytest.raises(DeviceError, match="graph 'decoder'"):
        state.step(np.array([1, 2, 3]))
    assert state.lengths == [8, 2, 13]
    state.truncate(0, 0)
    bench.fill(state, 0, PROMPTS[0], source)
    logits = state.step(np.array([1, 2, 3]))
    for row, prompt in enumerate(PROMPTS):
        _close(logits[row], bench.reference.run([*prompt, 1 + row], bench.source(row))["logits"])
