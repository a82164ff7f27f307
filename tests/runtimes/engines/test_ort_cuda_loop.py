"""The CUDA engine's loop on the CPU provider, beside the native loop, token for token.

Sessions, bindings and the C loop are the real ones, the sampling kernels are compiled for the host, the CUDA driver's library is
a stand-in.
"""

from __future__ import annotations

import gc
import shutil
import threading
import weakref

import numpy as np
import pytest
from toy_bench import PROMPTS, TOYS, Bench
from toy_bundle import halved, toy_bundle
from toy_decoder import Toy

from vlm_edge_runtime import _native
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.engines import EngineOptions, SamplingParams, open_engine, ort_cuda_place
from vlm_edge_runtime.engines.base import Decoder, DecoderState
from vlm_edge_runtime.engines.ort_cuda import OrtCudaEngine
from vlm_edge_runtime.engines.ort_cuda_decoder import OrtCudaDecoderState
from vlm_edge_runtime.errors import ContextLengthError, DeviceError
from vlm_edge_runtime.sessions.vision_language_model import VisionLanguageModel

OPTIONS = EngineOptions(threads=1, spin=False)
SAMPLED = SamplingParams(temperature=0.8, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=4)
FORBIDDEN = SamplingParams(repetition_penalty=1.3, suppress_tokens=(7, 8, 9), no_repeat_ngram_size=2, min_length=9)


@pytest.fixture(name="engine")
def _engine(tmp_path, place):
    def make(toy: Toy, options: EngineOptions = OPTIONS, **where) -> OrtCudaEngine:
        return OrtCudaEngine(toy_bundle(tmp_path, toy, "lowered"), options, _place=place(**where))

    return make


def _fill(
    decoder: Decoder, state: DecoderState, row: int, tokens: list[int], params: SamplingParams | None = None, axes: int = 1
) -> None:
    first = state.lengths[row]
    line = np.arange(first, first + len(tokens), dtype=np.int64)
    positions = np.stack([line] * axes) if axes > 1 else line
    state.prefill(row, decoder.embed(np.array(tokens, np.int64)), positions)
    if params is not None:
        state.start(row, params, np.array(tokens, np.int64), first + len(tokens))


def _generate(decoder: Decoder, params: list[SamplingParams], steps: int = 16, axes: int = 1) -> list[list[int]]:
    state = decoder.allocate(len(PROMPTS), 48)
    for row, prompt in enumerate(PROMPTS):
        _fill(decoder, state, row, prompt, params[row], axes)
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    for _ in range(steps // 4):
        for row, produced in enumerate(state.decode(4)):
            tokens[row] += produced.tokens
    state.close()
    return tokens


@pytest.mark.parametrize(
    "toy", [Toy(), Toy(rotary=True), Toy(axes=3), Toy(axes=0, rotary=True)], ids=["learned", "rotary", "m-rope", "counted"]
)
def test_tokens_of_the_native_loop_on_the_cpu_provider(tmp_path, engine, toy) -> None:
    ours = engine(toy)
    engines = [open_engine(toy_bundle(tmp_path, toy, "lowered"), "cpu", OPTIONS), ours]
    axes = max(toy.axes, 1)
    greedy = _generate(engines[0].decoder(), [SamplingParams()] * 3, axes=axes)
    mixed = [SamplingParams(eos_token_ids=(greedy[0][3],)), SAMPLED, FORBIDDEN]
    for params in ([SamplingParams()] * 3, mixed):
        texts = [_generate(one.decoder(), params, axes=axes) for one in engines]
        assert texts[0] == texts[1]
        assert len(set(map(tuple, texts[0]))) == 3  # rows differ, so a mixed-up row would show
    counts = ours.step_counts
    # Of 2 × 15 steps the very first is queued: the second state has what was captured for the first.
    assert (counts.queued, counts.captured, counts.host_sampled) == (1, 29, 0), counts


@pytest.mark.parametrize("name", sorted(TOYS))
def test_steps_with_further_inputs_are_launched_by_the_c_loop_on_the_cpu_provider(name, engine) -> None:
    """Static, per-token and recurrent inputs lie at addresses that stay, and the runs bound to them serve call after call."""
    toy = TOYS[name]
    bench = Bench(engine(toy), toy)
    state = bench.filled()
    tokens: list[list[int]] = [[], [], []]
    pieces = None
    for steps in (2, 3, 4):
        for row, produced in enumerate(state.decode(steps)):
            tokens[row] += produced.tokens
        now = state._steps._now.graphs
        assert pieces is None or all(one is two for one, two in zip(now[0], pieces, strict=True))
        pieces = now.get(0)
    assert tokens == [bench.expected(row, 9) for row in range(3)]
    assert bench.engine.step_counts.captured == 7 and bench.engine.step_counts.queued == 1
    runs = [piece.runs for piece in pieces if isinstance(piece, _native.BoundRun)]
    assert runs == [7, 7], "each step ran embedding and decoder once, in the loop"


def test_captures_are_counted_and_serve_the_next_state_on_the_cpu_provider(engine, monkeypatch) -> None:
    """What numbers CUDA graphs would have: the CPU provider overlooks them."""
    monkeypatch.setattr(ort_cuda_place, "MOST_CAPTURES", 6)
    captured, plain = engine(Toy(rotary=True), cuda_graphs=True), engine(Toy(rotary=True))
    assert (captured.uncaptured, plain.uncaptured) == (None, "not asked for")
    texts = [_generate(one.decoder(), [SamplingParams(), SAMPLED, FORBIDDEN]) for one in (captured, plain) for _ in range(3)]
    assert all(text == texts[0] for text in texts)
    assert (captured.place.captures, plain.place.captures) == (2, 0), "embedding and decoder, once for three states"
    held = [captured.decoder().allocate(1, 48) for _ in range(3)]
    for state in held:
        _fill(captured.decoder(), state, 0, PROMPTS[0], SamplingParams())
        state.decode(4)
    assert captured.place.captures == 6
    assert captured.uncaptured == "6 CUDA graphs were captured for decoder states, and ONNX Runtime frees none of them"
    assert held[0].decode(3)[0].tokens == held[2].decode(3)[0].tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-smolvlm"])
def test_answers_of_the_trained_models_on_the_cpu_provider(name, portable_bundle, scene, tmp_path, place) -> None:
    from graph_targets import graph_target

    from vlm_edge.targets.build import build

    path = tmp_path / f"{name}.vlm"
    shutil.copytree(portable_bundle(name), path)
    build(path, graph_target("cpu-fp32"))
    picture, _ = scene
    bundle = open_bundle(path, build="cpu-fp32")
    engines = [open_engine(bundle, "cpu", OPTIONS), OrtCudaEngine(bundle, OPTIONS, _place=place())]
    answers = []
    for engine in engines:
        with VisionLanguageModel(bundle, engine) as vlm:
            found = [
                vlm.generate("describe the picture", images=[picture], max_new_tokens=16, temperature=0.0),
                vlm.generate("what is on the left?", images=[picture], max_new_tokens=16, temperature=0.9, seed=3),
                vlm.generate("what is on the left?", images=[picture], max_new_tokens=8, num_beams=3),
            ]
            answers.append([one.tokens for one in found])
    assert answers[0] == answers[1]


def test_a_call_copies_the_table_and_no_token_copies_more_on_the_cpu_provider(engine) -> None:
    made = engine(Toy())
    decoder, counts = made.decoder(), made.place.device.counts
    state = decoder.allocate(2, 48)
    for row, params in enumerate((SamplingParams(), SAMPLED)):
        _fill(decoder, state, row, PROMPTS[row], params)
    state.decode(2)
    for steps in (5, 15):
        before = dict(counts)
        assert [len(row.tokens) for row in state.decode(steps)] == [steps] * 2
        assert {name: counts[name] - before[name] for name in ("uploads", "downloads")} == {"uploads": 1, "downloads": 1}
    before = counts["downloads"]
    state.logits(1)
    assert counts["downloads"] == before + 1


def test_only_the_most_likely_tokens_are_ranked_on_the_host_on_the_cpu_provider(engine) -> None:
    made = engine(Toy())
    decoder = made.decoder()
    state = decoder.allocate(2, 48)
    _fill(decoder, state, 0, PROMPTS[0], SamplingParams())
    _fill(decoder, state, 1, PROMPTS[1], SamplingParams(logprobs=3))
    rows = state.decode(5)
    assert [len(top) for top in rows[1].top_logprobs] == [3] * 5 and not rows[0].top_logprobs
    assert made.step_counts.host_sampled == 5 and made.step_counts.captured == 0


def test_the_c_loop_is_stopped_from_another_thread_on_the_cpu_provider(engine) -> None:
    decoder = engine(Toy(positions=5000)).decoder()
    state = decoder.allocate(1, 4096)
    _fill(decoder, state, 0, PROMPTS[0], SamplingParams())
    state.decode(4)
    (run,) = [piece for piece in state._steps._now.graphs[0] if isinstance(piece, _native.BoundRun)][:1]
    seen: list[int] = []

    def stop() -> None:
        while run.runs < 8:  # runs while the loop does, which does not hold the interpreter lock
            pass
        seen.append(run.runs)
        state.cancel()

    thread = threading.Thread(target=stop)
    thread.start()
    (row,) = state.decode(4000)
    thread.join()
    assert seen and len(row.tokens) < 3900, (seen, len(row.tokens))
    assert state.decode(5)[0].tokens == []
    last = row.tokens[-1]
    state.start(0, SamplingParams(), np.zeros(0, np.int64), state.lengths[0])
    state.push(0, last)
    assert len(state.decode(3)[0].tokens) == 3


def test_a_full_row_that_sits_a_step_out_is_not_touched_on_the_cpu_provider(engine) -> None:
    """The graph's own capacity leaves no entry behind the last one."""
    toy = Toy(capacity=8)
    decoder, expected = engine(toy).decoder(), engine(toy).decoder()
    state, other = decoder.allocate(2, 8), expected.allocate(1, 8)
    _fill(decoder, state, 0, PROMPTS[2][:8], SamplingParams())  # full
    _fill(decoder, state, 1, PROMPTS[1], SamplingParams())
    _fill(expected, other, 0, PROMPTS[2][:7])
    state.decode(1)
    state.truncate(0, 8)
    state.decode(4)  # row 1 alone
    assert state.lengths == [8, 6]
    copy = decoder.allocate(1, 8)
    copy.copy_prefix(0, state, 0, 7)
    for target, which in ((copy, decoder), (other, expected)):
        _fill(which, target, 0, PROMPTS[2][7:8])
    np.testing.assert_allclose(copy.logits(0), other.logits(0), atol=1e-4)
    for head in range(toy.kv_heads):  # the last entry is still the row's
        np.testing.assert_allclose(_entry(state, 0, head, 7), _entry(copy, 0, head, 7), atol=1e-5)


def _entry(state: DecoderState, row: int, head: int, at: int) -> np.ndarray:
    cache = state._steps.cache
    spec = cache.specs[0]
    found = np.empty(spec.entry // 4, np.float32)
    address = cache.past(0, 0) + row * cache.row_bytes(spec) + (head * cache.bucket + at) * spec.entry
    state._steps.device.download(found, address)
    return found


def test_half_precision_with_float32_embeddings_on_the_cpu_provider(tmp_path, place) -> None:
    toy = Toy(rotary=True)
    bundle = toy_bundle(tmp_path, toy, "lowered")
    reference = open_engine(bundle, "cpu", OPTIONS).decoder()
    full = _generate(reference, [SamplingParams()] * 3)
    (tmp_path / "lowered.onnx").write_bytes(halved((tmp_path / "lowered.onnx").read_bytes()))
    made = OrtCudaEngine(bundle, OPTIONS, _place=place())
    decoder = made.decoder()
    signature = decoder.allocate(1, 8).programs.signature
    assert signature.types["inputs_embeds"] == "float16" and signature.types["logits"] == "float32"
    state, other = decoder.allocate(2, 64), reference.allocate(2, 64)
    assert state.kv_bytes * 2 == other.kv_bytes
    for which, loop in ((decoder, state), (reference, other)):
        _fill(which, loop, 1, PROMPTS[2], SamplingParams())
    for forced in full[2][:6]:  # the same tokens in both, so that a near tie does not part them
        for loop in (state, other):
            loop.push(1, forced)
        wanted = other.logits(1)
        assert state.logits(1).dtype == np.float32
        np.testing.assert_allclose(state.logits(1), wanted, atol=1e-2 * np.abs(wanted).max())
    assert len(state.decode(4)[1].tokens) == 4
    assert made.step_counts.captured == 3  # embedding, its conversion, decoder, the logits' conversion: all in the loop


def test_a_growing_cache_runs_through_the_reference_loop_on_the_cpu_provider(tmp_path, place) -> None:
    bundle = toy_bundle(tmp_path, Toy(), None)
    expected = _generate(open_engine(bundle, "cpu", OPTIONS).decoder(), [SamplingParams()] * 3)
    engine = OrtCudaEngine(bundle, OPTIONS, _place=place())
    assert _generate(engine.decoder(), [SamplingParams()] * 3) == expected
    assert engine.uncaptured == "the cache grows at every token"


def test_buffers_serve_the_next_state_of_their_size_on_the_cpu_provider(engine) -> None:
    made = engine(Toy())
    decoder, device = made.decoder(), made.place.device
    first = decoder.allocate(1, 24)
    _fill(decoder, first, 0, PROMPTS[2], SamplingParams())
    tokens = first.decode(5)[0].tokens
    steps = first._steps
    first.close()
    second, third = decoder.allocate(1, 24), decoder.allocate(1, 24)
    assert second._steps is steps and third._steps is not steps
    assert second.lengths == [0]
    _fill(decoder, second, 0, PROMPTS[2], SamplingParams())
    assert second.decode(5)[0].tokens == tokens
    for size in (8, 9, 10, 11):
        decoder.allocate(1, size).close()
    lost = weakref.ref(third)
    del third  # a state that nobody closed is freed too
    gc.collect()
    assert lost() is None
    second.close()
    made.close()
    gc.collect()
    assert not device.live


def test_a_state_that_held_nan_leaves_none_to_the_next_on_the_cpu_provider(engine) -> None:
    decoder = engine(Toy(nan_token=9)).decoder()
    state = decoder.allocate(2, 24)
    for row in range(2):
        _fill(decoder, state, row, PROMPTS[row], SamplingParams())
    state.decode(1)
    state.push(1, 9)
    with pytest.raises(DeviceError, match="NaN"):
        state.decode(2)
    steps = state._steps
    state.close()
    assert decoder.allocate(2, 24)._steps is not steps


def test_a_closed_engine_refuses_everything_on_the_cpu_provider(engine) -> None:
    made = engine(Toy())
    decoder, graph = made.decoder(), made.graph("embed_tokens")
    state = decoder.allocate(1, 24)
    _fill(decoder, state, 0, PROMPTS[0], SamplingParams())
    made.close()
    made.close()
    calls = [lambda: made.graph("decoder"), made.decoder, lambda: decoder.allocate(1, 4), lambda: graph.run({})]
    calls += [lambda: state.lengths, lambda: state.decode(1)]
    for call in calls:
        with pytest.raises(DeviceError, match=r"closed|takes input_ids"):
            call()


def test_times_prefill_chunks_and_limits_on_the_cpu_provider(engine) -> None:
    whole, parts = engine(Toy()), engine(Toy(), EngineOptions(1, False, 4))
    texts = [_generate(one.decoder(), [SAMPLED] * 3) for one in (whole, parts)]
    assert texts[0] == texts[1]
    times = [{role: len(seconds) for role, seconds in one.graph_times().items()} for one in (whole, parts)]
    assert times[0]["decoder"] == 3 + 15 and times[1]["decoder"] == times[0]["decoder"] + 1 + 3
    decoder = whole.decoder()
    state = decoder.allocate(1, 7)
    with pytest.raises(ContextLengthError, match="needs 13 more entries"):
        _fill(decoder, state, 0, PROMPTS[2])
    _fill(decoder, state, 0, PROMPTS[0], SamplingParams())
    assert len(state.decode(10)[0].tokens) == 3
    with pytest.raises(ContextLengthError, match="fills the KV cache"):
        state.decode(1)


def test_misfits_are_refused_on_the_cpu_provider(tmp_path, engine, place) -> None:
    decoder = engine(Toy(axes=0, rotary=True, capacity=16)).decoder()
    with pytest.raises(DeviceError, match="has a cache of 16 entries, asked for were 24"):
        decoder.allocate(1, 24)
    for batch, capacity in ((0, 16), (1, 0)):
        with pytest.raises(ValueError, match=f"batch {batch}, capacity {capacity}: expected"):
            decoder.allocate(batch, capacity)
    state = decoder.allocate(1, 16)
    embeds = decoder.embed(np.array([3, 4], np.int64))
    with pytest.raises(ValueError, match="position 5 does not follow 0 entries"):
        state.prefill(0, embeds, np.array([5, 6]))
    with pytest.raises(ValueError, match=r"inputs_embeds are \[2, 31\]"):
        state.prefill(0, embeds[:, 1:], np.array([0, 1]))
    state.prefill(0, embeds, np.array([0, 1]))
    with pytest.raises(ValueError, match="next_position 9 does not follow 2 entries"):
        state.start(0, SamplingParams(), np.zeros(0, np.int64), 9)
    bundle = toy_bundle(tmp_path, Toy(), "lowered")
    bundle.graphs["decoder"] = bundle.manifest.graphs["decoder"]  # says that its cache is shared, which it is not
    with pytest.raises(DeviceError, match="was it lowered to a shared cache"):
        OrtCudaEngine(bundle, OPTIONS, _place=place()).decoder()


def test_a_state_of_another_engine_is_no_source(engine) -> None:
    one, other = (engine(Toy()).decoder() for _ in range(2))
    states = one.allocate(1, 16), other.allocate(1, 16)
    assert isinstance(states[0], OrtCudaDecoderState)
    with pytest.raises(ValueError, match="another decoder"):
        states[0].copy_prefix(0, states[1], 0, 0)
