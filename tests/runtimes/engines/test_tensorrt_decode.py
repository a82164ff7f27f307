"""What the GPU's decoder state does beyond what every engine does: captured steps, buckets, the last entry, the host's sampler.

Over stand-ins of GPU and TensorRT (`host_device`); compared with the CPU engine, token for token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from host_engine import device_of, toy_bench, toy_engine
from host_kernels import HostKernels
from toy_bench import OPTIONS, PROMPTS, TOYS, Bench
from toy_bundle import toy_bundle
from toy_decoder import Toy

from vlm_edge_runtime.engines import EngineOptions, SamplingParams, open_engine
from vlm_edge_runtime.engines.tensorrt import TensorRTEngine
from vlm_edge_runtime.engines.tensorrt_rows import chunk_ends
from vlm_edge_runtime.errors import ContextLengthError, DeviceError

Make = Callable[..., TensorRTEngine]
SAMPLED = [
    SamplingParams(temperature=0.8, top_k=30, top_p=0.9, repetition_penalty=1.2, seed=4, logprobs=0),
    SamplingParams(temperature=1.2, min_p=0.05, seed=5, no_repeat_ngram_size=2, sequence_bias=(((7,), 1.5),)),
    SamplingParams(temperature=0.6, top_p=0.7, seed=2**40, suppress_tokens=(3, 4, 5), min_length=20, eos_token_ids=(11, 12)),
]


@pytest.fixture(scope="module", name="kernels")
def _kernels(tmp_path_factory) -> HostKernels:
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=["in place", "two sets"], name="make")
def _make(request, tmp_path, kernels) -> Make:
    def make(toy: Toy, **more: object) -> TensorRTEngine:
        return toy_engine(tmp_path / "engine", kernels, toy, native=request.param == "in place", **more)  # type: ignore[arg-type]

    return make


def _fill(bench: Bench, state, params: list[SamplingParams]) -> None:
    for row, prompt in enumerate(PROMPTS[: state.batch]):
        bench.fill(state, row, prompt, bench.source(row), params[row])


def _decode(state, steps: list[int]) -> list[tuple[list[int], list[float]]]:
    found: list[tuple[list[int], list[float]]] = [([], []) for _ in range(state.batch)]
    for count in steps:
        for row, produced in enumerate(state.decode(count)):
            found[row][0].extend(produced.tokens)
            found[row][1].extend(produced.logprobs)
    return found


@pytest.mark.parametrize(
    "toy", [Toy(), TOYS["cross-attention"], TOYS["recurrent and cached"]], ids=["plain", "cross", "recurrent"]
)
def test_sampled_tokens_are_the_cpu_engines(make, tmp_path, toy) -> None:
    engine = make(toy)
    bench = toy_bench(engine, toy)
    cpu = Bench(open_engine(toy_bundle(tmp_path, toy, "lowered"), "cpu", OPTIONS), toy)
    found = []
    for one in (bench, cpu):
        state = one.decoder.allocate(3, 48)
        _fill(one, state, SAMPLED)
        found.append(_decode(state, [1, 5, 2, 12]))
    for (tokens, logprobs), (expected, expected_logprobs) in zip(*found, strict=True):
        assert tokens == expected
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-4)
    assert engine.step_counts.host_sampled == 0 and engine.step_counts.captured >= 15


def test_a_captured_step_asks_nothing_of_the_host(make) -> None:
    engine = make(Toy())
    bench, device = toy_bench(engine, Toy()), device_of(engine)
    state = bench.filled(48)
    state.decode(4)
    before = dict(device.counts)
    captured = engine.step_counts.captured
    assert [len(row.tokens) for row in state.decode(20)] == [20, 20, 20]
    assert engine.step_counts.captured == captured + 20
    assert device.counts["graph launches"] == before["graph launches"] + 20
    # The rows' table goes up and comes back once for a whole call.
    assert (device.counts["uploads"], device.counts["downloads"]) == (before["uploads"] + 1, before["downloads"] + 1)
    assert device.counts["graphs"] == (1 if engine.decoder().signature.in_place else 2)  # type: ignore[attr-defined]


def test_where_nothing_can_be_captured_steps_are_queued_and_that_is_said(make) -> None:
    engine = make(Toy(), captures=False)
    bench = toy_bench(engine, Toy())
    state = bench.filled()
    assert [row.tokens for row in state.decode(8)] == [bench.expected(row, 8) for row in range(3)]
    counts = engine.step_counts
    assert (counts.captured, counts.queued) == (0, 7)
    assert counts.not_captured_because == "the engine of graph 'embed_tokens' cannot be captured"


def test_a_capture_that_fails_costs_speed_and_is_said(make) -> None:
    engine = make(Toy())
    bench, device = toy_bench(engine, Toy()), device_of(engine)
    state = bench.filled()

    def refuse() -> int:
        device.captured = None
        raise DeviceError("cuStreamEndCapture failed: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED.")

    device.end_capture = refuse  # type: ignore[method-assign]
    assert [row.tokens for row in state.decode(8)] == [bench.expected(row, 8) for row in range(3)]
    assert engine.step_counts.captured == 0
    assert engine.step_counts.not_captured_because.startswith("cuStreamEndCapture failed")


def test_shapes_that_change_are_captured_anew(make) -> None:
    toy = TOYS["cross-attention"]
    engine = make(toy)
    bench, device = toy_bench(engine, toy), device_of(engine)
    state = bench.filled(40)
    state.decode(6)
    graphs = device.counts["graphs"]
    live = len(device.libcuda.launches)
    state.truncate(1, 0)  # the longest source goes
    bench.fill(state, 1, PROMPTS[1], bench.source(2))
    expected = bench.reference.greedy(PROMPTS[1], bench.source(2), 6)
    assert state.decode(6)[1].tokens == expected
    assert device.counts["graphs"] == 2 * graphs and len(device.libcuda.launches) == live
    state.truncate(1, 0)
    bench.fill(state, 1, PROMPTS[1], bench.source(2))
    assert state.decode(6)[1].tokens == expected
    assert device.counts["graphs"] == 2 * graphs, "equal shapes are not captured again"


@pytest.mark.parametrize("batch", [1, 2])
def test_a_row_that_fills_the_engines_cache_keeps_its_last_entry(make, batch) -> None:
    toy = Toy()
    engine = make(toy, buckets=(16, 32))
    bench = toy_bench(engine, toy)
    state = bench.decoder.allocate(batch, 16)
    full = [*range(3, 18)]
    source = bench.source(0)
    bench.prefill(state, 0, full, None)
    state.start(0, SamplingParams(), np.array(full), len(full))
    if batch > 1:
        bench.fill(state, 1, PROMPTS[1], source)
    first = state.decode(1)[0].tokens
    tokens = first + state.decode(10)[0].tokens  # fills its 16 entries after one step
    assert state.lengths[0] == 16 and len(tokens) == 2
    with pytest.raises(ContextLengthError, match="row 0 fills the KV cache's 16 entries"):
        state.decode(1)
    if batch > 1:
        # Row 0 ends with its cache full; the other one goes on, and writes its entries beside it.
        state.push(0, tokens[-1])
        state._rows[0].finished = True
        assert len(state.decode(9)[1].tokens) == 9
    larger = bench.decoder.allocate(1, 32)
    larger.copy_prefix(0, state, 0, 16)
    bench.prefill(larger, 0, [tokens[1]], None)
    np.testing.assert_allclose(larger.logits(0), bench.reference.run([*full, *tokens], source)["logits"], atol=1e-4, rtol=1e-4)


def test_the_smallest_bucket_that_holds_what_is_asked_for(make) -> None:
    engine = make(Toy(), buckets=(16, 32, 64))
    decoder = toy_bench(engine, Toy()).decoder
    runtime = engine._runtime
    assert list(runtime.loaded) == ["embed_tokens.onnx"]  # type: ignore[attr-defined]
    state = decoder.allocate(1, 17)
    assert list(runtime.loaded)[-1] == "decoder.c32.onnx" and state.capacity == 17  # type: ignore[attr-defined]
    with pytest.raises(
        DeviceError, match=r"a cache of 65 entries was asked for, the largest .* is 64: load with context_length=64"
    ):
        decoder.allocate(1, 65)
    for batch, capacity in ((0, 4), (1, 0), (2000, 4)):
        with pytest.raises(ValueError, match="expected 1 to 1024"):
            decoder.allocate(batch, capacity)


def test_log_probabilities_of_other_tokens_come_from_the_host_and_are_counted(make, tmp_path) -> None:
    toy = Toy()
    engine = make(toy)
    params = [SamplingParams(logprobs=3, temperature=0.9, seed=8, repetition_penalty=1.4), SAMPLED[1], SamplingParams(logprobs=2)]
    cpu = Bench(open_engine(toy_bundle(tmp_path, toy, "lowered"), "cpu", OPTIONS), toy)
    found = []
    for one in (toy_bench(engine, toy), cpu):
        state = one.decoder.allocate(3, 48)
        _fill(one, state, params)
        found.append([state.decode(count) for count in (1, 4)])
    for mine, theirs in zip(*found, strict=True):
        for row, other in zip(mine, theirs, strict=True):
            assert row.tokens == other.tokens
            for top, expected in zip(row.top_logprobs, other.top_logprobs, strict=True):
                assert [token for token, _ in top] == [token for token, _ in expected]
    assert engine.step_counts.host_sampled == 10 and engine.step_counts.captured == 0


def test_prefill_is_cut_at_what_the_engine_takes(make) -> None:
    for toy, chunk in ((Toy(), 4), (TOYS["recurrent and cached"], 3), (TOYS["masks and features per token"], 5)):
        engine = make(toy, chunk=chunk)
        bench = toy_bench(engine, toy)
        state = bench.filled()
        assert engine.step_counts.rows == sum(-(-len(prompt) // chunk) for prompt in PROMPTS)
        assert [row.tokens for row in state.decode(6)] == [bench.expected(row, 6) for row in range(3)]


@pytest.mark.parametrize(
    ("tokens", "longest", "blocks", "ends"),
    [
        (5, None, None, [5]),
        (5, 5, None, [5]),
        (7, 3, None, [3, 6, 7]),
        (7, 3, [0] * 7, [3, 6, 7]),
        (7, 3, [0, 0, 1, 1, 0, 0, 0], [2, 5, 7]),
        (7, 3, [0, 1, 1, 2, 2, 2, 0], [3, 6, 7]),
        (7, 3, [0, 1, 1, 1, 1, 1, 0], [1, 6, 7]),
        (6, 3, [1, 1, 1, 1, 1, 1], [6]),
    ],
)
def test_no_piece_of_a_prefill_cuts_a_block(tokens, longest, blocks, ends) -> None:
    assert chunk_ends(tokens, longest, None if blocks is None else np.array(blocks)) == ends


def test_rows_whose_windows_are_not_aligned_are_staged(make) -> None:
    """3 kv heads × 10 entries × 12 × 4 bytes: a row begins anywhere."""
    toy = Toy(kv_heads=1, heads=3, size=12)
    engine = make(toy, buckets=(10,))
    bench = toy_bench(engine, toy)
    state = bench.decoder.allocate(3, 10)
    for row, prompt in enumerate([[3, 5, 7], [2], [9, 8]]):
        bench.fill(state, row, prompt, bench.source(row))
    expected = [bench.reference.greedy(prompt, bench.source(0), 6) for prompt in ([3, 5, 7], [2], [9, 8])]
    assert [row.tokens for row in state.decode(6)] == expected


def test_nan_in_one_row_does_not_outlive_it(make) -> None:
    toy = Toy(nan_token=9)
    engine = make(toy)
    bench = toy_bench(engine, toy)
    state = bench.decoder.allocate(2, 32)
    bench.prefill(state, 0, [3, 5], None)
    bench.prefill(state, 0, [9, 4], None)
    state.start(0, SamplingParams(), np.zeros(0, np.int64), 4)
    with pytest.raises(DeviceError, match=r"graph 'decoder' computed logits that contain NaN \(row 0, entry 4\): there is no"):
        state.decode(1)
    state.truncate(0, 2)
    bench.prefill(state, 0, [7], None)
    close = bench.reference.run([3, 5, 7], bench.source(0))["logits"]
    np.testing.assert_allclose(state.logits(0), close, atol=1e-4, rtol=1e-4)


def test_cancel_while_captured_steps_run(make) -> None:
    engine = make(Toy(), buckets=(4096,))
    bench, device = toy_bench(engine, Toy(positions=5000)), device_of(engine)
    state = bench.decoder.allocate(1, 4000)
    bench.fill(state, 0, PROMPTS[0], bench.source(0))
    state.decode(4)
    started = threading.Event()
    replay = device.launch_graph
    for handle, work in list(device.libcuda.launches.items()):
        device.libcuda.launches[handle] = lambda work=work: (started.set(), work())
    produced: list[int] = []
    thread = threading.Thread(target=lambda: produced.extend(state.decode(200)[0].tokens))
    thread.start()
    assert started.wait(60)
    with pytest.raises(DeviceError, match="in use by another thread"):
        state.decode(1)
    state.cancel()
    thread.join(60)
    assert 0 < len(produced) < 200 and not thread.is_alive() and replay
    assert state.lengths[0] == len(PROMPTS[0]) + 4 + len(produced) - 1
    assert state.decode(3)[0].tokens == []


def test_memory_that_cannot_be_had_is_told_and_given_back(make) -> None:
    engine = make(Toy(), options=EngineOptions(1, False))
    decoder, device = engine.decoder(), device_of(engine)
    held = sum(device.live.values())
    device.limit = held + 20_000
    with pytest.raises(DeviceError, match="no 0 MiB left"):
        decoder.allocate(8, 64)
    assert sum(device.live.values()) == held
    device.limit = 1 << 40
    state = decoder.allocate(8, 64)
    state.close()
    assert sum(device.live.values()) == held
    left = decoder.allocate(2, 64)
    engine.close()
    assert not device.live and device.closed
    with pytest.raises(DeviceError, match="the decoder state is closed"):
        left.decode(1)
    for call in (engine.decoder, lambda: engine.graph("embed_tokens"), lambda: decoder.allocate(1, 4)):
        with pytest.raises(DeviceError, match="closed"):
            call()


def test_more_rows_than_the_engine_takes_are_refused_before_anything_runs(make) -> None:
    decoder = make(Toy(), chunk=8).decoder()  # whose profile has 64 rows
    assert decoder.allocate(64, 8).batch == 64
    with pytest.raises(DeviceError, match=r"65 rows were asked for \(prompts × beams\), the decoder's engine was built for 64"):
        decoder.allocate(65, 8)


def test_engines_that_no_state_uses_make_room(make) -> None:
    engine = make(Toy(), buckets=(16, 32))
    decoder, device = engine.decoder(), device_of(engine)
    small, other = decoder.allocate(1, 16), decoder.allocate(1, 16)
    programs = engine._runtime.loaded  # type: ignore[attr-defined]
    device.limit = sum(device.live.values()) + 100
    with pytest.raises(DeviceError, match="has no"):
        decoder.allocate(1, 32)
    assert not programs["decoder.c16.onnx"].closed
    small.close()
    other.close()
    with pytest.raises(DeviceError, match="has no"):  # still too little: the stand-in's programs take none
        decoder.allocate(64, 32)
    assert programs["decoder.c16.onnx"].closed
    device.limit = 1 << 40
    assert decoder.allocate(1, 32).lengths == [0] and decoder.allocate(1, 16).lengths == [0]


def test_both_kinds_of_cache_are_what_they_say(tmp_path: Path, kernels: HostKernels) -> None:
    for native in (True, False):
        engine = toy_engine(tmp_path / str(native), kernels, Toy(), native=native)
        assert engine.decoder().signature.in_place is native  # type: ignore[attr-defined]
        state = engine.decoder().allocate(2, 64)
        assert state.kv_bytes == 2 * 2 * 2 * 2 * 64 * 16 * 4 * (1 if native else 2)  # type: ignore[attr-defined]
