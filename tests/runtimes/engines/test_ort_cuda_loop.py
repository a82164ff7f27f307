"""The CUDA engine's loop on the CPU provider: the same code over host memory, beside the native loop, token for token."""

from __future__ import annotations

import shutil
import threading
import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from toy_bench import PROMPTS
from toy_bundle import toy_bundle
from toy_decoder import Toy

from vlm_edge_runtime import _native
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.engines import EngineOptions, SamplingParams, open_engine
from vlm_edge_runtime.engines.base import Array, Decoder, DecoderState
from vlm_edge_runtime.engines.ort_cuda import OrtCudaEngine
from vlm_edge_runtime.engines.ort_cuda_memory import HostMemory
from vlm_edge_runtime.engines.ort_cuda_models import cast, greedy_sampler
from vlm_edge_runtime.engines.ort_cuda_place import Place, host_place
from vlm_edge_runtime.engines.ort_cuda_state import OrtCudaDecoderState, is_plainly_greedy, moves
from vlm_edge_runtime.errors import ContextLengthError, DeviceError
from vlm_edge_runtime.sessions.vision_language_model import VisionLanguageModel

OPTIONS = EngineOptions(threads=1, spin=False)
SAMPLED = SamplingParams(temperature=0.8, top_k=30, top_p=0.9, repetition_penalty=1.2, seed=4)


class CountingMemory(HostMemory):
    """Host memory that counts what goes up and comes down."""

    def __init__(self) -> None:
        super().__init__()
        self.up: list[int] = []
        self.down: list[int] = []

    def upload(self, address: int, array: Array) -> None:
        self.up.append(array.nbytes)
        super().upload(address, array)

    def download(self, address: int, array: Array) -> None:
        self.down.append(array.nbytes)
        super().download(address, array)

    @property
    def blocks(self) -> int:
        return len(self._blocks)


def _captured_place() -> Place:
    """A place that asks for CUDA graphs, which the CPU provider overlooks: every length is then said to be the capacity."""
    return Place("CPUExecutionProvider", HostMemory(), cuda_graphs=True)


def _engine(folder: Path, toy: Toy, memory: HostMemory | None = None, options: EngineOptions = OPTIONS) -> OrtCudaEngine:
    place = Place("CPUExecutionProvider", memory) if memory else host_place()
    return OrtCudaEngine(toy_bundle(folder, toy, "lowered"), options, _place=place)


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
def test_tokens_of_the_native_loop_on_the_cpu_provider(tmp_path, toy) -> None:
    engines = [open_engine(toy_bundle(tmp_path, toy, "lowered"), "cpu", OPTIONS), _engine(tmp_path, toy)]
    axes = max(toy.axes, 1)
    greedy = _generate(engines[0].decoder(), [SamplingParams()] * 3, axes=axes)
    mixed = [SamplingParams(eos_token_ids=(greedy[0][3],)), SAMPLED, SamplingParams(repetition_penalty=1.3)]
    for params in ([SamplingParams()] * 3, mixed):
        texts = [_generate(engine.decoder(), params, axes=axes) for engine in engines]
        assert texts[0] == texts[1]
        assert len(set(map(tuple, texts[0]))) == 3  # rows differ, so a mixed-up row would show


def test_steps_of_constant_length_give_the_same_tokens_on_the_cpu_provider(tmp_path) -> None:
    bundle = toy_bundle(tmp_path, Toy(rotary=True), "lowered")
    engines = [OrtCudaEngine(bundle, OPTIONS, _place=place) for place in (host_place(), _captured_place())]
    assert [engine.uncaptured for engine in engines] == ["not asked for", None]
    mixed = [SamplingParams(), SAMPLED, SamplingParams()]
    texts = [_generate(engine.decoder(), mixed) for engine in engines]
    assert texts[0] == texts[1]
    states = [engine.decoder().allocate(2, 40) for engine in engines]
    for engine, state in zip(engines, states, strict=True):
        _fill(engine.decoder(), state, 0, PROMPTS[0], SamplingParams())
        state.decode(4)
    assert [state._buffers._total.tolist() for state in states] == [[8], [40]]


def test_decoders_whose_shapes_follow_the_prompt_are_not_captured_on_the_cpu_provider(tmp_path) -> None:
    bundle = toy_bundle(tmp_path, Toy(cross=True), "lowered")
    assert "shapes change with the prompt" in OrtCudaEngine(bundle, OPTIONS, _place=_captured_place()).uncaptured


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-smolvlm"])
def test_answers_of_the_trained_models_on_the_cpu_provider(name, portable_bundle, scene, tmp_path) -> None:
    from graph_targets import graph_target

    from vlm_edge.targets.build import build

    path = tmp_path / f"{name}.vlm"
    shutil.copytree(portable_bundle(name), path)
    build(path, graph_target("cpu-fp32"))
    picture, _ = scene
    bundle = open_bundle(path, build="cpu-fp32")
    engines = [open_engine(bundle, "cpu", OPTIONS), OrtCudaEngine(bundle, OPTIONS, _place=host_place())]
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


def test_a_greedy_step_copies_tokens_and_nothing_else_on_the_cpu_provider(tmp_path) -> None:
    memory = CountingMemory()
    decoder = _engine(tmp_path, Toy(), memory).decoder()
    state = decoder.allocate(2, 48)
    for row in range(2):
        _fill(decoder, state, row, PROMPTS[row], SamplingParams())
    state.decode(2)
    bound = state._buffers._bound
    memory.up.clear()
    memory.down.clear()
    state.decode(10)
    assert state._buffers._bound is bound  # bound once
    # three aligned pieces up (positions, lengths, tokens), two down (tokens, faults); no logits, no cache
    assert memory.up == [3 * 256] * 10 and memory.down == [2 * 256] * 10
    logits = state.logits(1)
    assert memory.down[10:] == [61 * 4]
    np.testing.assert_array_equal(logits, state.logits(1))
    assert memory.down[11:] == []  # kept once fetched


def test_only_rows_with_other_rules_fetch_their_logits_on_the_cpu_provider(tmp_path) -> None:
    memory = CountingMemory()
    decoder = _engine(tmp_path, Toy(), memory).decoder()
    state = decoder.allocate(2, 48)
    _fill(decoder, state, 0, PROMPTS[0], SamplingParams(eos_token_ids=(60,)))
    _fill(decoder, state, 1, PROMPTS[1], SAMPLED)
    state.decode(2)
    memory.down.clear()
    state.decode(5)
    assert sorted(memory.down) == [61 * 4] * 5 + [512] * 5


@pytest.mark.parametrize(
    ("change", "plain"),
    [({}, True), ({"eos_token_ids": (3,), "seed": 5, "top_k": 4, "top_p": 0.5, "min_p": 0.1}, True)]
    + [
        ({key: value}, False)
        for key, value in [("temperature", 0.1), ("repetition_penalty", 1.1), ("logprobs", 0), ("min_length", 2)]
    ]
    + [({"suppress_tokens": (1,)}, False), ({"no_repeat_ngram_size": 2}, False), ({"forced_tokens": ((1, (2,)),)}, False)],
)
def test_which_rules_the_device_can_follow(change, plain) -> None:
    assert is_plainly_greedy(SamplingParams(**change)) is plain


def test_a_full_row_that_sits_a_step_out_is_not_touched_on_the_cpu_provider(tmp_path) -> None:
    expected = _engine(tmp_path, Toy()).decoder()
    decoder = _engine(tmp_path, Toy()).decoder()
    state, other = decoder.allocate(2, 8), expected.allocate(1, 24)
    _fill(decoder, state, 0, PROMPTS[2][:8], SamplingParams())  # full
    _fill(decoder, state, 1, PROMPTS[1], SamplingParams())
    _fill(expected, other, 0, PROMPTS[2][:8])
    state.decode(1)
    state.truncate(0, 8)
    state.decode(4)  # row 1 alone
    assert state.lengths == [8, 6]
    copy = decoder.allocate(1, 24)
    copy.copy_prefix(0, state, 0, 8)
    for target in (copy, other):
        _fill(decoder, target, 0, [40])
    np.testing.assert_allclose(copy.logits(0), other.logits(0), atol=1e-4)


def test_half_precision_with_float32_embeddings_on_the_cpu_provider(tmp_path) -> None:
    toy = Toy(rotary=True)
    bundle = toy_bundle(tmp_path, toy, "lowered")
    full = _generate(open_engine(bundle, "cpu", OPTIONS).decoder(), [SamplingParams()] * 3)
    reference = open_engine(bundle, "cpu", OPTIONS).decoder()
    (tmp_path / "lowered.onnx").write_bytes(_halved((tmp_path / "lowered.onnx").read_bytes()))
    decoder = OrtCudaEngine(bundle, OPTIONS, _place=host_place()).decoder()
    assert decoder._graphs.types["inputs_embeds"] == "float16" and decoder._graphs.embed_type == "float32"
    state, other = decoder.allocate(2, 48), reference.allocate(2, 48)
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


def _halved(model: bytes) -> bytes:
    """The toy with fp16 weights, cache, embeddings and logits."""
    loaded = onnx.load_from_string(model)
    graph = loaded.graph
    for number, weight in enumerate(graph.initializer):
        array = numpy_helper.to_array(weight)
        if array.dtype == np.float32:
            graph.initializer[number].CopyFrom(numpy_helper.from_array(array.astype(np.float16), weight.name))
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return loaded.SerializeToString()


def test_a_growing_cache_runs_through_the_reference_loop_on_the_cpu_provider(tmp_path) -> None:
    bundle = toy_bundle(tmp_path, Toy(), None)
    expected = _generate(open_engine(bundle, "cpu", OPTIONS).decoder(), [SamplingParams()] * 3)
    engine = OrtCudaEngine(bundle, OPTIONS, _place=host_place())
    assert _generate(engine.decoder(), [SamplingParams()] * 3) == expected
    assert engine.uncaptured == "the cache grows at every token"


def test_buffers_serve_the_next_state_of_their_size_on_the_cpu_provider(tmp_path) -> None:
    memory = CountingMemory()
    engine = _engine(tmp_path, Toy(), memory)
    decoder = engine.decoder()
    first = decoder.allocate(1, 24)
    _fill(decoder, first, 0, PROMPTS[2], SamplingParams())
    tokens = first.decode(5)[0].tokens
    buffers = first._buffers
    first.close()
    second, third = decoder.allocate(1, 24), decoder.allocate(1, 24)
    assert second._buffers is buffers and third._buffers is not buffers
    assert third._buffers.graph_id != buffers.graph_id
    _fill(decoder, second, 0, PROMPTS[2], SamplingParams())
    assert second.decode(5)[0].tokens == tokens
    for size in (8, 9, 10, 11):
        decoder.allocate(1, size).close()
    lost = weakref.ref(third)
    del third  # a state that nobody closed gives its buffers back too
    assert lost() is None
    second.close()
    engine.close()
    assert memory.blocks == 0


def test_a_closed_engine_frees_what_states_gave_back_on_the_cpu_provider(tmp_path) -> None:
    memory = CountingMemory()
    engine = _engine(tmp_path, Toy(), memory)
    decoder = engine.decoder()
    state = decoder.allocate(1, 24)
    _fill(decoder, state, 0, PROMPTS[0], SamplingParams())
    graph = engine.graph("embed_tokens")
    engine.close()
    for call in (lambda: engine.graph("decoder"), engine.decoder, lambda: decoder.allocate(1, 4), lambda: graph.run({})):
        with pytest.raises(DeviceError, match="closed"):
            call()
    assert len(state.decode(3)[0].tokens) == 3  # a state keeps what it runs on
    state.close()
    assert memory.blocks == 0
    for late in (lambda: state.lengths, lambda: state.decode(1)):
        with pytest.raises(DeviceError, match="closed"):
            late()


def test_times_prefill_chunks_and_limits_on_the_cpu_provider(tmp_path) -> None:
    whole, parts = _engine(tmp_path, Toy()), _engine(tmp_path, Toy(), options=EngineOptions(1, False, 4))
    texts = [_generate(engine.decoder(), [SAMPLED] * 3) for engine in (whole, parts)]
    assert texts[0] == texts[1]
    times = [{role: len(seconds) for role, seconds in engine.graph_times().items()} for engine in (whole, parts)]
    assert times[0]["decoder"] == 3 + 15 and times[1]["decoder"] == times[0]["decoder"] + 1 + 3
    decoder = whole.decoder()
    state = decoder.allocate(1, 7)
    with pytest.raises(ContextLengthError, match="needs 13 more entries"):
        _fill(decoder, state, 0, PROMPTS[2])
    _fill(decoder, state, 0, PROMPTS[0], SamplingParams())
    assert len(state.decode(10)[0].tokens) == 3
    with pytest.raises(ContextLengthError, match="fills the KV cache"):
        state.decode(1)


def test_misfits_are_refused_on_the_cpu_provider(tmp_path) -> None:
    decoder = _engine(tmp_path, Toy(axes=0, rotary=True, capacity=16)).decoder()
    with pytest.raises(DeviceError, match="has a cache of 16 entries, asked for were 24"):
        decoder.allocate(1, 24)
    for batch, capacity in ((0, 16), (1, 0)):
        with pytest.raises(ValueError, match="both must be at least 1"):
            decoder.allocate(batch, capacity)
    state = decoder.allocate(1, 16)
    embeds = decoder.embed(np.array([3, 4], np.int64))
    with pytest.raises(ValueError, match="position 5 does not follow 0 entries"):
        state.prefill(0, embeds, np.array([5, 6]))
    with pytest.raises(ValueError, match=r"inputs_embeds have the shape \(2, 31\)"):
        state.prefill(0, embeds[:, 1:], np.array([0, 1]))
    with pytest.raises(ValueError, match="positions have the shape"):
        state.prefill(0, embeds, np.array([[0, 1]]))
    state.prefill(0, embeds, np.array([0, 1]))
    with pytest.raises(ValueError, match="next_position 9 does not follow 2 entries"):
        state.start(0, SamplingParams(), np.zeros(0, np.int64), 9)
    with pytest.raises(DeviceError, match="was it lowered to a shared cache"):
        OrtCudaEngine(_as_shared(tmp_path), OPTIONS, _place=host_place()).decoder()


def _as_shared(folder: Path):
    """A bundle that says its portable decoder has a shared cache."""
    bundle = toy_bundle(folder, Toy(), "lowered")
    bundle.graphs["decoder"] = bundle.manifest.graphs["decoder"]
    return bundle


def test_nan_logits_are_an_error_on_the_cpu_provider(tmp_path) -> None:
    decoder = _engine(tmp_path, Toy(nan_token=9)).decoder()
    state = decoder.allocate(2, 24)
    for row in range(2):
        _fill(decoder, state, row, PROMPTS[row], SamplingParams())
    state.decode(1)
    state.push(1, 9)
    with pytest.raises(DeviceError, match="NaN"):
        state.decode(2)


@given(st.data())
def test_the_device_sampler_chooses_as_the_host_sampler(data) -> None:
    import onnxruntime

    vocab = 37
    dtype = data.draw(st.sampled_from(["float32", "float16"]))
    values = st.sampled_from([0.0, 1.0, 2.0, -3.0, float("inf"), float("-inf"), float("nan")])
    rows = np.array(data.draw(st.lists(st.lists(values, min_size=vocab, max_size=vocab), min_size=1, max_size=3)), dtype)
    session = onnxruntime.InferenceSession(greedy_sampler(vocab, dtype), providers=["CPUExecutionProvider"])
    ids, faults = session.run(None, {"logits": rows[:, None]})
    assert ids.shape == faults.shape == (len(rows), 1)
    for row, chosen, fault in zip(rows.astype(np.float32), ids[:, 0], faults[:, 0], strict=True):
        try:
            wanted, _, _ = _native.Sampler(vocab, SamplingParams()).choose(row)
        except DeviceError:
            assert fault != 0 and 0 <= chosen < vocab
        else:
            assert fault == 0 and chosen == wanted


def test_the_small_models_are_valid_onnx() -> None:
    for model in (greedy_sampler(300, "float16"), cast(8, "float32", "float16")):
        onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    with pytest.raises(ValueError, match="vocabulary"):
        greedy_sampler(1 << 25, "float32")


@given(st.integers(1, 6).flatmap(lambda count: st.lists(st.integers(0, count - 1), min_size=count, max_size=count)))
def test_moves_make_each_row_what_its_source_was(sources) -> None:
    rows = {**dict(enumerate(range(len(sources)))), -1: None}
    for to, source, owner in moves(sources):
        assert to != source and sources[owner] == rows[source]  # the copied row is the one whose length is taken
        rows[to] = rows[source]
    assert [rows[row] for row in range(len(sources))] == sources


def test_the_interpreter_lock_is_free_while_a_graph_runs(tmp_path) -> None:
    size, rounds = 700, 12
    nodes = [helper.make_node("MatMul", [f"x{i}", "x0"], [f"x{i + 1}"]) for i in range(rounds)]
    info = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [size, size]) for i in (0, rounds)]
    model = helper.make_model(
        helper.make_graph(nodes, "busy", info[:1], info[1:]), ir_version=8, opset_imports=[helper.make_opsetid("", 17)]
    )
    session, _ = host_place().session(model.SerializeToString(), "busy")
    binding = session.io_binding()
    binding.bind_cpu_input("x0", np.full((size, size), 1e-3, np.float32))
    binding.bind_output(f"x{rounds}", "cpu")
    entered, left = threading.Event(), threading.Event()

    def run() -> None:
        entered.set()
        session.run_with_iobinding(binding)
        left.set()

    thread = threading.Thread(target=run)
    thread.start()
    entered.wait()
    counted = 0
    while not left.is_set():
        counted += 1
    thread.join()
    assert counted > 1000  # a run that kept the lock would let this thread count only around it


def test_a_state_of_another_engine_is_no_source(tmp_path) -> None:
    one, other = (_engine(tmp_path, Toy()).decoder() for _ in range(2))
    states = one.allocate(1, 16), other.allocate(1, 16)
    assert isinstance(states[0], OrtCudaDecoderState)
    with pytest.raises(ValueError, match="another decoder"):
        states[0].copy_prefix(0, states[1], 0, 0)
