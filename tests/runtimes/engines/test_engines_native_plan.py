"""The engine with a decoder's plan: the same calls as with ONNX Runtime, and the same tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from vlm_edge.targets.build import build
from vlm_edge.targets.target import load_target
from vlm_edge_runtime import load
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.engines import EngineOptions, SamplingParams, open_engine
from vlm_edge_runtime.errors import ContextLengthError, DeviceError

GREEDY = SamplingParams(eos_token_ids=())


def target(name: str, kernels: str):
    found = load_target(name)
    options = msgspec.structs.replace(found.options, kernels=kernels)
    return msgspec.structs.replace(found, name=f"{name}-{kernels}", options=options)


@pytest.fixture(scope="module")
def bundle(portable_bundle, tmp_path_factory) -> Path:
    """tiny-llava with builds of either kind, fp32 and int4."""
    path = tmp_path_factory.mktemp("plan") / "tiny.vlm"
    shutil.copytree(portable_bundle("tiny-llava"), path)
    for name in ("cpu-fp32", "cpu-int4"):
        for kernels in ("native", "onnxruntime"):
            build(path, target(name, kernels))
    return path


def states(bundle: Path, batch: int, capacity: int, threads: int = 2):
    """A decoder and a state of each engine at full precision."""
    for kernels in ("native", "onnxruntime"):
        opened = open_bundle(bundle, build=f"cpu-fp32-{kernels}")
        decoder = open_engine(opened, options=EngineOptions(threads=threads)).decoder()
        yield decoder, decoder.allocate(batch, capacity)


def fill(decoder, state, row: int, tokens: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(3, 400, tokens)
    start = state.lengths[row]
    state.prefill(row, decoder.embed(ids), np.arange(start, start + tokens))


def agree(left, right) -> None:
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-4 * np.abs(right).max())


def test_the_build_says_what_runs_its_decoder(bundle):
    opened = open_bundle(bundle, build="cpu-int4-native")
    assert opened.build.options["decoder.kernels"] == "native"
    assert opened.graphs["decoder"].format == "plan"
    assert opened.kv.dtype == "float16"
    assert not list((bundle / "builds" / "cpu-int4-native").glob("decoder.onnx*")), "the weights are there once"
    assert open_bundle(bundle, build="cpu-int4-onnxruntime").graphs["decoder"].format == "onnx"


def test_rows_of_unlike_length_decode_as_with_onnx_runtime(bundle):
    found = []
    for decoder, state in states(bundle, 3, 200):
        for row, tokens in enumerate((5, 70, 131)):
            fill(decoder, state, row, tokens, row)
            state.start(row, GREEDY, np.zeros(0, np.int64), tokens)
        rows = state.decode(20)
        found.append(([row.tokens for row in rows], [state.logits(row) for row in range(3)]))
    assert found[0][0] == found[1][0]
    for left, right in zip(found[0][1], found[1][1], strict=True):
        agree(left, right)


def test_prefixes_copies_steps_and_reordering_as_with_onnx_runtime(bundle):
    found = []
    for decoder, state in states(bundle, 2, 64):
        logits = []
        fill(decoder, state, 0, 30, 1)
        logits.append(state.logits(0))
        fill(decoder, state, 0, 9, 2)  # a chunk after a past
        logits.append(state.logits(0))
        state.copy_prefix(1, state, 0, 25)
        fill(decoder, state, 1, 1, 3)
        logits.append(state.logits(1))
        state.truncate(0, 26)
        fill(decoder, state, 0, 2, 4)
        for row in range(2):
            state.start(row, GREEDY, np.zeros(0, np.int64), state.lengths[row])
        logits += list(state.step(np.array([7, 11])))
        state.reorder([1, 1])
        logits += list(state.step(np.array([5, 9])))
        state.push(0, 17)
        logits.append(state.logits(0))
        assert state.lengths == [29, 28]
        found.append(logits)
    for left, right in zip(*found, strict=True):
        agree(left, right)


def test_a_row_does_not_depend_on_its_neighbours(bundle):
    alone, together = [], []
    decoder, state = next(states(bundle, 2, 64))
    fill(decoder, state, 0, 12, 1)
    state.start(0, GREEDY, np.zeros(0, np.int64), 12)
    alone = state.decode(10)[0].tokens
    decoder, state = next(states(bundle, 2, 64))
    for row, tokens in enumerate((12, 40)):
        fill(decoder, state, row, tokens, 1 + row)
        state.start(row, GREEDY, np.zeros(0, np.int64), tokens)
    together = state.decode(10)[0].tokens
    assert alone == together


def test_a_full_cache_and_a_position_beyond_the_tables_are_errors(bundle):
    decoder, state = next(states(bundle, 1, 16))
    with pytest.raises(ContextLengthError):
        fill(decoder, state, 0, 17, 0)
    with pytest.raises(DeviceError, match="position 5000"):
        state.prefill(0, decoder.embed(np.array([5])), np.array([5000]))
    assert state.lengths == [0]


def test_answers_are_those_of_onnx_runtime(bundle, scene):
    picture, answer = scene
    texts = {}
    for kernels in ("native", "onnxruntime"):
        with load(bundle, build=f"cpu-int4-{kernels}") as vlm:
            texts[kernels] = vlm.generate("what do you see?", images=[picture], max_new_tokens=20, temperature=0.0).text.strip()
    assert texts["native"] == texts["onnxruntime"] == answer


def test_a_model_without_decoder_is_built_as_ever(portable_bundle, tmp_path):
    shutil.copytree(portable_bundle("clip"), tmp_path / "clip.vlm")
    assert "decoder.kernels" not in build(tmp_path / "clip.vlm", target("cpu-fp32", "native")).options


@pytest.mark.slow
def test_a_decoder_that_has_no_plan_stays_with_onnx_runtime_and_says_why(portable_bundle, tmp_path):
    shutil.copytree(portable_bundle("janus"), tmp_path / "janus.vlm")
    made = build(tmp_path / "janus.vlm", target("cpu-fp32", "native"))
    assert str(made.options["decoder.kernels"]).startswith("onnxruntime: no native kernel for ")
    assert made.graphs["decoder"].format == "onnx"


@pytest.mark.slow
def test_accuracy_of_int4_is_pytorchs_within_a_point(portable_bundle, tmp_path):
    """400 held-out questions on each trained model: the portable graphs (PyTorch's answers), and the plan with 4-bit weights."""
    from benchmarks.train import scenes

    examples = scenes.held_out_examples(400, seed=11)
    for name in ("tiny-llava", "tiny-smolvlm"):
        path = tmp_path / f"{name}.vlm"
        shutil.copytree(portable_bundle(name), path)
        build(path, target("cpu-int4", "native"))
        right = {}
        for chosen in (None, "cpu-int4-native"):
            with load(path, build=chosen) as vlm:
                answers = [
                    vlm.generate(one.prompt, images=[one.image], max_new_tokens=40, temperature=0.0).text for one in examples
                ]
            right[chosen] = sum(text.strip() == one.answer for text, one in zip(answers, examples, strict=True))
        assert right["cpu-int4-native"] >= right[None] - 0.01 * len(examples), (name, right)
