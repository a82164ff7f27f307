"""Both engines over one bundle: the native loop and the portable reference give the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
from toy_bundle import toy_bundle
from toy_decoder import Toy

from vlm_edge_runtime.engines import EngineOptions, SamplingParams, open_engine, threads
from vlm_edge_runtime.engines.base import Decoder, DecoderState, Engine, Graph
from vlm_edge_runtime.engines.native_ort import NativeOrtEngine
from vlm_edge_runtime.engines.portable import PortableOrtEngine
from vlm_edge_runtime.errors import BundleError, ContextLengthError, DeviceError

OPTIONS = EngineOptions(threads=1, spin=False)
PROMPTS = [[3, 5, 7, 11, 13], [2, 4], list(range(20, 33))]
SAMPLED = SamplingParams(temperature=0.8, top_k=30, top_p=0.9, repetition_penalty=1.2, seed=4)


@pytest.fixture(scope="module", params=["portable", "lowered"], name="engine")
def _engine(request, tmp_path_factory) -> Engine:
    bundle = toy_bundle(tmp_path_factory.mktemp(request.param), Toy(), request.param if request.param == "lowered" else None)
    return open_engine(bundle, "cpu", OPTIONS)


def _positions(first: int, count: int, axes: int = 1) -> np.ndarray:
    line = np.arange(first, first + count, dtype=np.int64)
    return line if axes == 1 else np.stack([line] * axes)


def _fill(decoder: Decoder, state: DecoderState, row: int, tokens: list[int], axes: int = 1) -> None:
    embeds = decoder.embed(np.array(tokens, np.int64))
    state.prefill(row, embeds, _positions(state.lengths[row], len(tokens), axes))


def _generate(
    decoder: Decoder, prompts: list[list[int]], params: list[SamplingParams], steps: int, axes: int = 1
) -> list[list[int]]:
    state = decoder.allocate(len(prompts), 64)
    for row, prompt in enumerate(prompts):
        _fill(decoder, state, row, prompt, axes)
        state.start(row, params[row], np.array(prompt, np.int64), len(prompt))
    tokens: list[list[int]] = [[] for _ in prompts]
    for _ in range(steps // 4):
        for row, produced in enumerate(state.decode(4)):
            tokens[row] += produced.tokens
    state.close()
    return tokens


@pytest.mark.parametrize("toy", [Toy(), Toy(rotary=True), Toy(axes=3)], ids=["learned", "rotary", "m-rope"])
def test_portable_and_native_give_the_same_tokens(tmp_path, toy) -> None:
    engines = [open_engine(toy_bundle(tmp_path, toy, build), "auto", OPTIONS) for build in (None, "lowered")]
    assert isinstance(engines[0], PortableOrtEngine) and isinstance(engines[1], NativeOrtEngine)
    assert not isinstance(engines[1], PortableOrtEngine)
    greedy = _generate(engines[0].decoder(), PROMPTS, [SamplingParams()] * 3, 16, toy.axes)
    stops = [SamplingParams(eos_token_ids=(greedy[0][3],)), SAMPLED, SamplingParams(eos_token_ids=(greedy[2][9],))]
    for params in ([SamplingParams()] * 3, stops):
        texts = [_generate(engine.decoder(), PROMPTS, params, 16, toy.axes) for engine in engines]
        assert texts[0] == texts[1]
        single = [_generate(engines[1].decoder(), [p], [q], 16, toy.axes)[0] for p, q in zip(PROMPTS, params, strict=True)]
        assert single == texts[0]
    for engine in engines:
        engine.close()


def test_the_protocols_are_met(engine) -> None:
    assert isinstance(engine.graph("embed_tokens"), Graph)
    decoder = engine.decoder()
    assert decoder is engine.decoder()
    assert (decoder.hidden_size, decoder.vocab_size) == (32, 61)
    assert decoder.embed(np.array([1, 2, 3], np.int64)).shape == (3, 32)
    with pytest.raises(ValueError, match="2 dimensions, expected 1"):
        decoder.embed(np.zeros((1, 2), np.int64))
    state = decoder.allocate(2, 16)
    assert (state.batch, state.capacity, state.lengths) == (2, 16, [0, 0])


def test_teacher_forcing_and_log_probabilities(engine) -> None:
    decoder = engine.decoder()
    state = decoder.allocate(1, 32)
    _fill(decoder, state, 0, PROMPTS[0])
    before = state.logits(0)
    assert before.dtype == np.float32 and before.shape == (61,)
    state.start(0, SamplingParams(logprobs=2), np.array(PROMPTS[0], np.int64), len(PROMPTS[0]))
    (row,) = state.decode(1)
    assert row.tokens == [int(before.argmax())] and len(row.top_logprobs[0]) == 2
    assert row.top_logprobs[0][0] == (row.tokens[0], pytest.approx(row.logprobs[0]))
    np.testing.assert_array_equal(state.logits(0), before)
    state.push(0, 9)
    forced = state.logits(0)
    other = decoder.allocate(1, 32)
    _fill(decoder, other, 0, [*PROMPTS[0], 9])
    np.testing.assert_allclose(forced, other.logits(0), atol=1e-4)
    assert state.decode(1)[0].tokens == [int(forced.argmax())]


def test_prefix_reuse(engine) -> None:
    decoder = engine.decoder()
    expected = _generate(decoder, [[*PROMPTS[2][:8], 40, 41]], [SamplingParams()], 8)[0]
    state, copy = decoder.allocate(1, 32), decoder.allocate(2, 24)
    _fill(decoder, state, 0, PROMPTS[2])
    copy.copy_prefix(1, state, 0, 8)
    state.truncate(0, 8)
    for target, row in ((state, 0), (copy, 1)):
        assert target.lengths[row] == 8
        _fill(decoder, target, row, [40, 41])
        target.start(row, SamplingParams(), np.zeros(0, np.int64), 10)
        assert target.decode(8)[row].tokens == expected


def test_full_cache(engine) -> None:
    decoder = engine.decoder()
    state = decoder.allocate(1, 7)
    with pytest.raises(ContextLengthError, match="needs 13 more entries"):
        _fill(decoder, state, 0, PROMPTS[2])
    _fill(decoder, state, 0, PROMPTS[0])
    state.start(0, SamplingParams(), np.zeros(0, np.int64), 5)
    assert len(state.decode(10)[0].tokens) == 3
    with pytest.raises(ContextLengthError, match="fills the KV cache"):
        state.decode(1)


def test_misuse_and_use_after_close(engine) -> None:
    decoder = engine.decoder()
    state = decoder.allocate(1, 8)
    for call in (
        lambda: state.logits(0),
        lambda: state.logits(1),
        lambda: state.push(0, 1),
        lambda: state.decode(0),
        lambda: state.truncate(0, 5),
        lambda: state.start(0, SamplingParams(), np.zeros(0, np.int64), 0),
        lambda: decoder.allocate(0, 8),
        lambda: decoder.allocate(1, 0),
    ):
        with pytest.raises(ValueError):
            call()
    state.cancel()
    state.close()
    for call in (lambda: state.lengths, lambda: state.decode(1), lambda: state.truncate(0, 0)):
        with pytest.raises(DeviceError, match="closed"):
            call()


def test_cancel_lasts_until_the_next_start(engine) -> None:
    decoder = engine.decoder()
    state = decoder.allocate(1, 32)
    _fill(decoder, state, 0, PROMPTS[0])
    state.start(0, SamplingParams(), np.zeros(0, np.int64), 5)
    state.cancel()
    assert state.decode(4)[0].tokens == []
    state.start(0, SamplingParams(), np.zeros(0, np.int64), 5)
    assert len(state.decode(4)[0].tokens) == 4


def test_times_per_graph(tmp_path) -> None:
    for build in (None, "lowered"):
        engine = open_engine(toy_bundle(tmp_path, Toy(), build), "cpu", OPTIONS)
        _generate(engine.decoder(), [PROMPTS[0]], [SamplingParams()], 8)
        times = engine.graph_times()
        assert {role: len(seconds) for role, seconds in times.items()} == {"decoder": 8, "embed_tokens": 8}
        engine.close()


def test_prefill_chunk_option(tmp_path) -> None:
    bundle = toy_bundle(tmp_path, Toy(), "lowered")
    whole, parts = NativeOrtEngine(bundle, OPTIONS), NativeOrtEngine(bundle, EngineOptions(1, False, 4))
    texts = [_generate(engine.decoder(), [PROMPTS[2]], [SAMPLED], 12) for engine in (whole, parts)]
    assert texts[0] == texts[1]
    assert len(parts.graph_times()["decoder"]) == len(whole.graph_times()["decoder"]) + 3


def test_closed_engine(tmp_path) -> None:
    engine = open_engine(toy_bundle(tmp_path, Toy(), "lowered"), "cpu", OPTIONS)
    decoder = engine.decoder()
    state = decoder.allocate(1, 16)
    _fill(decoder, state, 0, PROMPTS[0])
    graph = engine.graph("embed_tokens")
    engine.close()
    engine.close()
    for call in (lambda: engine.graph("decoder"), engine.decoder, lambda: decoder.allocate(1, 4), lambda: graph.run({})):
        with pytest.raises(DeviceError, match="closed"):
            call()
    state.start(0, SamplingParams(), np.zeros(0, np.int64), 5)
    assert len(state.decode(3)[0].tokens) == 3  # a state keeps what it runs on


def test_graph_of_an_unknown_role(tmp_path) -> None:
    engine = open_engine(toy_bundle(tmp_path, Toy(), None), "cpu", OPTIONS)
    with pytest.raises(BundleError, match="no graph 'vision_encoder'"):
        engine.graph("vision_encoder")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tensorrt", "the portable form of .* runs on device 'cpu', 'tensorrt' was asked for"),
        ("gpu", "unknown device 'gpu'"),
        ("", "unknown device ''"),
    ],
)
def test_other_devices_are_refused(tmp_path, device, message) -> None:
    with pytest.raises(DeviceError, match=message):
        open_engine(toy_bundle(tmp_path, Toy(), None), device)


def test_builds_for_other_backends_are_refused(tmp_path) -> None:
    with pytest.raises(DeviceError, match="for the backend 'coreml', this version runs: ort-cpu, "):
        open_engine(toy_bundle(tmp_path, Toy(), "lowered", backend="coreml"))
    with pytest.raises(DeviceError, match="runs on device 'tensorrt-rtx', 'cpu' was asked for"):
        open_engine(toy_bundle(tmp_path, Toy(), "lowered", backend="tensorrt-rtx"), "cpu")


@pytest.mark.parametrize(
    ("content", "expected"),
    [("max 100000", None), ("150000 100000", 2), ("50000 100000", 1), ("garbage", None), ("a b", None), (None, None)],
)
def test_container_quota(tmp_path, content, expected) -> None:
    file = tmp_path / "cpu.max"
    if content is not None:
        file.write_text(content, encoding="ascii")
    assert threads._quota(file) == expected
    assert threads.default_threads() >= 1
