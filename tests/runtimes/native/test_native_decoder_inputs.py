"""Further inputs and outputs of the C loop as the extension sees them: buffers, odd mappings, threads, memory."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper
from toy_decoder import Toy
from toy_pair import Pair
from toy_reference import random_source

from vlm_edge_runtime import _native
from vlm_edge_runtime.engines.base import SamplingParams
from vlm_edge_runtime.errors import DeviceError

TOY = Toy(cross=True, token_mask=True, feature=True, recurrent=True)
PROMPT = [3, 5, 7, 11]


@pytest.fixture(scope="module", name="pair")
def _pair() -> Pair:
    return Pair(TOY)


def _fill(pair: Pair, state: _native.DecoderState, row: int, entries: int) -> None:
    source = random_source(TOY, entries, len(PROMPT), seed=row)
    state.bind(row, source.bound)
    state.prefill(row, pair.embed(PROMPT), pair.positions(0, len(PROMPT)), source.prompt)
    state.start(row, SamplingParams(), np.array(PROMPT, np.int64), len(PROMPT), source.later)


def test_buffers_are_copied_and_let_go(pair) -> None:
    state = pair.state()
    source = random_source(TOY, 5, len(PROMPT), seed=0)
    arrays = [np.array(array) for array in (*source.bound.values(), *source.prompt.values(), *source.later.values())]
    bound = dict(zip(source.bound, arrays, strict=False))
    prompt = dict(zip(source.prompt, arrays[len(bound) :], strict=False))
    later = dict(zip(source.later, arrays[len(bound) + len(prompt) :], strict=True))
    with pytest.raises(ValueError, match="missing"):
        state.bind(0, {name: array for name, array in bound.items() if name != "state.0"})
    state.bind(0, bound)
    with pytest.raises(ValueError, match=r"deepstack\.0 has size 4"):
        state.prefill(0, pair.embed(PROMPT[:3]), pair.positions(0, 3), prompt)
    state.prefill(0, pair.embed(PROMPT), pair.positions(0, len(PROMPT)), prompt)
    with pytest.raises(ValueError, match="top_p"):
        state.start(0, SamplingParams(top_p=0), np.zeros(0, np.int64), 4, later)
    state.start(0, SamplingParams(), np.zeros(0, np.int64), 4, later)
    before = state.decode(1)[0][0]
    alive = [weakref.ref(array) for array in arrays]
    arrays.clear()
    for mapping in (bound, prompt, later):
        mapping.clear()
    assert [reference() for reference in alive] == [None] * len(alive)
    other = pair.state()
    other.bind(0, source.bound)
    other.prefill(0, pair.embed(PROMPT), pair.positions(0, len(PROMPT)), source.prompt)
    other.start(0, SamplingParams(), np.zeros(0, np.int64), 4, source.later)
    assert other.decode(6)[0][0] == before + state.decode(5)[0][0]


def test_odd_mappings_are_refused(pair) -> None:
    state = pair.state()
    source = random_source(TOY, 5, len(PROMPT), seed=0)
    with pytest.raises(ValueError, match=r"no input 3 to bind; it takes .*'state.0'"):
        state.bind(0, source.bound | {3: source.bound["state.0"]})
    for mapping in (3, [1, 2]):
        with pytest.raises((TypeError, AttributeError)):
            state.bind(0, mapping)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"state\.0 must be a C-contiguous array of float32"):
        state.bind(0, source.bound | {"state.0": np.zeros(64, np.float32)[::2]})
    with pytest.raises(TypeError):
        state.reorder(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tokens is int32, expected int64"):
        state.step(np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="row -1"):
        state.outputs(-1)
    with pytest.raises(ValueError, match="row 0 has no logits"):
        state.outputs(0)


def test_dimensions_that_nothing_says_are_refused(pair) -> None:
    def with_input(shape: list[object]) -> bytes:
        model = onnx.load_from_string(Toy().lowered_model())
        model.graph.input.append(helper.make_tensor_value_info("memory", TensorProto.FLOAT, shape))
        return model.SerializeToString()

    def with_output(shape: list[object]) -> bytes:
        model = onnx.load_from_string(Toy().lowered_model())
        # A shape that no inference can tell: [n, n] over the embeddings that are not zero.
        for op, inputs, output, attributes in [
            ("NonZero", ["inputs_embeds"], "places", {}),
            ("Cast", ["places"], "numbers", {"to": TensorProto.FLOAT}),
            ("Transpose", ["numbers"], "rows", {}),
            ("MatMul", ["rows", "numbers"], "more", {}),
        ]:
            model.graph.node.append(helper.make_node(op, inputs, [output], **attributes))
        model.graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, shape))
        return model.SerializeToString()

    for model, message in [
        (with_input(["batch", None, 3]), r"dimension 1 \(''\) of 'memory' is neither fixed nor named"),
        (with_output(["batch", "heads"]), r"dimension 1 \('heads'\) of 'more' is neither fixed nor named after one of an input"),
        (with_output([3, "batch"]), r"an output 'more' that is not \[batch, …\]"),
    ]:
        with pytest.raises(DeviceError, match=message):
            _native.DecoderState(_native.Session(model, "decoder"), pair.embed_tokens, 1, 8)


def test_calls_from_two_threads(pair) -> None:
    """Whatever comes while another call runs is refused, and the state survives it."""
    state = pair.state(batch=4, capacity=1024)
    for row in range(4):
        _fill(pair, state, row, 3 + row)
    busy = 0

    def run() -> None:
        for _ in range(60):
            state_call(lambda: state.step(np.arange(4)))

    def state_call(call) -> None:
        nonlocal busy
        try:
            call()
        except DeviceError as error:
            assert "in use by another thread" in str(error)
            busy += 1

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        state_call(lambda: state.outputs(2))
        state_call(lambda: state.reorder([0, 1, 2, 3]))
    for thread in threads:
        thread.join()
    assert state.lengths[0] >= len(PROMPT) + 1 and len(set(state.lengths)) == 1
    state.close()


@pytest.mark.skipif("VLM_EDGE_SANITIZED" in os.environ, reason="AddressSanitizer keeps freed memory")
def test_memory_is_steady(pair) -> None:
    def cycle(turn: int) -> None:
        state = pair.state(batch=3, capacity=32)
        for row in range(3):
            _fill(pair, state, row, 100 + 50 * (row + turn % 2))
        state.step(np.array([1, 2, 3]))
        try:
            state.reorder([1, 2, 0])
        except ValueError:
            state.reorder([0, 1, 2])
        state.outputs(1)
        state.truncate(0, 0)
        _fill(pair, state, 0, 400)
        state.decode(2)
        with pytest.raises(ValueError, match="missing"):
            state.bind(0, {})

    for turn in range(30):
        cycle(turn)
    gc.collect()
    before = psutil.Process().memory_info().rss
    for turn in range(150):
        cycle(turn)
    gc.collect()
    # One state holds more than a megabyte: 150 leaked ones would be 150 MiB.
    assert psutil.Process().memory_info().rss - before < 12 << 20
