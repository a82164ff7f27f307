"""Drafts that run together with a row's newest token: the same tokens and the same bits as single steps."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from vlm_edge.targets.build import build
from vlm_edge.targets.target import load_target
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.engines import EngineOptions, SamplingParams, open_engine
from vlm_edge_runtime.errors import ContextLengthError, DeviceError


def made(name: str, portable_bundle, root: Path, target: str, kernels: str = "native") -> Path:
    path = root / f"{name}.vlm"
    if not path.exists():
        shutil.copytree(portable_bundle(name), path)
    found = load_target(target)
    options = msgspec.structs.replace(found.options, kernels=kernels)
    build(path, msgspec.structs.replace(found, name=f"{target}-{kernels}", options=options))
    return path


@pytest.fixture(scope="module")
def bundle(portable_bundle, tmp_path_factory) -> Path:
    """tiny-smolvlm as 4-bit and as full-precision plan (products of integers and of floats), and for ONNX Runtime."""
    root = tmp_path_factory.mktemp("verify")
    for target in ("cpu-int4", "cpu-fp32"):
        made("tiny-smolvlm", portable_bundle, root, target)
    return made("tiny-smolvlm", portable_bundle, root, "cpu-fp32", "onnxruntime")


def opened(bundle: Path, name: str, threads: int = 2):
    return open_engine(open_bundle(bundle, build=name), options=EngineOptions(threads=threads)).decoder()


def fill(decoder, state, row: int, tokens: int, **params) -> None:
    ids = np.random.default_rng(row + 100 * tokens).integers(3, 100, tokens)
    state.prefill(row, decoder.embed(ids), np.arange(tokens))
    state.start(row, SamplingParams(logprobs=decoder.vocab_size, **params), ids, tokens)


def single_steps(decoder, prompts, count: int, capacity: int = 700, **params):
    """Tokens and all log probabilities of each row, one step at a time."""
    state = decoder.allocate(len(prompts), capacity)
    for row, tokens in enumerate(prompts):
        fill(decoder, state, row, tokens, **params)
    return state.decode(count)


def speculated(decoder, prompts, expected, drafts, capacity: int = 700, **params):
    """The same rows by `verify`: `drafts(row, done)` gives what is proposed after so many tokens."""
    state = decoder.allocate(len(prompts), capacity)
    for row, tokens in enumerate(prompts):
        fill(decoder, state, row, tokens, **params)
    rows = state.verify([[] for _ in prompts])
    passes = 1
    while any(len(row.tokens) < len(right.tokens) for row, right in zip(rows, expected, strict=True)):
        proposed = []
        for number, (row, right) in enumerate(zip(rows, expected, strict=True)):
            left = len(right.tokens) - len(row.tokens)
            if left == 0 and not row.finished:
                state.truncate(number, state.lengths[number])
            proposed.append(drafts(number, len(row.tokens))[: max(0, left - 1)])
        for row, new in zip(rows, state.verify(proposed), strict=True):
            row.tokens += new.tokens
            row.logprobs += new.logprobs
            row.top_logprobs += new.top_logprobs
            row.finished = new.finished
        passes += 1
    return state, rows, passes


def assert_same(rows, expected) -> None:
    for row, right in zip(rows, expected, strict=True):
        assert row.tokens == right.tokens
        assert row.logprobs == right.logprobs, "the same bits"
        assert row.top_logprobs == right.top_logprobs


@pytest.mark.parametrize("build_name", ["cpu-int4-native", "cpu-fp32-native"])
def test_drafts_change_no_bit_of_any_token(bundle, build_name) -> None:
    """Right drafts, wrong ones and half-right ones, around the lengths at which attention is divided otherwise (64, 512)."""
    decoder = opened(bundle, build_name)
    assert decoder.allocate(1, 8)._native.verifies
    for prompt in (3, 55, 505):
        expected = single_steps(decoder, [prompt], 30)
        right = expected[0].tokens

        def drafts(row, done, right=right):
            wrong = [(right[done + 2] + 1) % decoder.vocab_size] if done + 2 < len(right) else []
            return [right[done : done + 14], right[done : done + 2] + wrong + right[:3], [5, 6], []][done % 4]

        state, rows, passes = speculated(decoder, [prompt], expected, drafts)
        assert_same(rows, expected)
        assert passes < 30
        assert state.lengths == [prompt + 29], "the newest token is not in the cache yet"
        np.testing.assert_array_equal(state.logits(0)[right[-1]], max(state.logits(0)))


def test_rows_of_a_batch_keep_as_many_drafts_as_each_holds(bundle) -> None:
    decoder = opened(bundle, "cpu-int4-native")
    prompts = [40, 3, 130]
    expected = single_steps(decoder, prompts, 16)

    def drafts(row, done):
        right = expected[row].tokens[done : done + 6]
        return right if row == 0 else [*right[:1], 7] if row == 1 else [] if done % 2 else right[:3]

    _, rows, passes = speculated(decoder, prompts, expected, drafts)
    assert_same(rows, expected)
    assert passes < 16


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_what_is_kept_goes_on_as_if_drafts_had_never_been(bundle, threads) -> None:
    """After rejected drafts the cache is cut, copied and continued: the same bits as where nothing was ever drafted."""
    decoder = opened(bundle, "cpu-int4-native", threads)
    expected = single_steps(decoder, [20], 12)
    state, *_ = speculated(decoder, [20], expected, lambda row, done: [9, 9, 9, 9, 9])
    other = decoder.allocate(1, 100)
    other.copy_prefix(0, state, 0, 31)
    plain = decoder.allocate(1, 100)
    fill(decoder, plain, 0, 20)
    plain.decode(12)
    for one in (other, plain):
        one.truncate(0, 31)
        one.prefill(0, decoder.embed(np.array([11, 12])), np.array([31, 32]))
    np.testing.assert_array_equal(other.logits(0), plain.logits(0))


def test_drafts_end_where_the_positions_end(portable_bundle, tmp_path) -> None:
    """A learned table of 256 positions, a cache with more room: drafts are cut there, in their row and beside it."""
    decoder = opened(made("llava-gpt2", portable_bundle, tmp_path, "cpu-fp32"), "cpu-fp32-native")
    prompts = [240, 20]
    expected = single_steps(decoder, prompts, 17)
    state, rows, passes = speculated(
        decoder, prompts, expected, lambda row, done: expected[row].tokens[done : done + 12] + [5] * 3
    )
    assert_same(rows, expected)
    assert passes < 8
    assert state.lengths == [256, 36]
    # Its newest token has no position any more, with a draft as without.
    for drafts in ([[1, 2], []], [[], []]):
        with pytest.raises(DeviceError, match="outside the table of 256"):
            state.verify(drafts)


@pytest.mark.parametrize("threads", range(1, 9))
def test_every_number_of_threads_gives_the_same_bits(bundle, threads) -> None:
    reference = opened(bundle, "cpu-int4-native", 1)
    prompts = [70, 5]
    expected = single_steps(reference, prompts, 14)

    def drafts(row, done):
        return [expected[row].tokens[done : done + 7], [9, 9], []][done % 3]

    decoder = opened(bundle, "cpu-int4-native", threads)
    assert_same(single_steps(decoder, prompts, 14), expected)
    _, rows, _ = speculated(decoder, prompts, expected, drafts)
    assert_same(rows, expected)


def test_rules_on_what_comes_next_see_single_steps(bundle) -> None:
    decoder = opened(bundle, "cpu-int4-native")
    rules = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "min_length": 30, "suppress_tokens": (17,)}
    free = single_steps(decoder, [24], 20)
    expected = single_steps(decoder, [24], 20, **rules)
    assert expected[0].tokens != free[0].tokens, "they must matter for this to show anything"
    _, rows, passes = speculated(decoder, [24], expected, lambda row, done: expected[0].tokens[done : done + 5], **rules)
    assert_same(rows, expected)
    assert passes < 10


def test_an_end_of_sequence_inside_a_draft_ends_the_row(bundle) -> None:
    decoder = opened(bundle, "cpu-int4-native")
    tokens = single_steps(decoder, [24], 12)[0].tokens
    end = next(index for index, token in enumerate(tokens) if index > 2 and token not in tokens[:index])
    expected = single_steps(decoder, [24], 12, eos_token_ids=(tokens[end],))
    assert expected[0].tokens == tokens[: end + 1]
    state = decoder.allocate(1, 100)
    fill(decoder, state, 0, 24, eos_token_ids=(tokens[end],))
    first = state.decode(1)[0].tokens
    (row,) = state.verify([tokens[1:]])
    assert first + row.tokens == tokens[: end + 1]
    assert row.finished
    assert state.lengths == [24 + end], "as after single steps: the end itself is not in the cache"
    assert state.verify([[]])[0].tokens == []


def test_what_does_not_fit_is_refused_before_anything_runs(bundle) -> None:
    decoder = opened(bundle, "cpu-int4-native")
    expected = single_steps(decoder, [24], 9, capacity=32)[0].tokens  # the ninth is not in the cache any more
    state = decoder.allocate(2, 32)
    for row in range(2):
        fill(decoder, state, row, 24 - 8 * row)
    with pytest.raises(ValueError, match="no newest token"):
        state.verify([[1], []])
    state.decode(1)
    with pytest.raises(ValueError, match="2 rows"):
        state.verify([[1]])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        state.verify([[1], [10**9]])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        state.verify([[-1], []])
    with pytest.raises(ContextLengthError, match="a draft of 8 tokens"):
        state.verify([expected[1:], []])
    assert state.lengths == [24, 16]
    # Row 1's longer draft does not fit row 0's room: they run one after the other.
    rows = state.verify([expected[1:8], [1] * 12])
    assert rows[0].tokens == expected[1:]
    assert state.lengths[0] == 32
    with pytest.raises(ContextLengthError, match="fills the KV cache"):
        state.verify([[], []])
    ort = opened(bundle, "cpu-fp32-onnxruntime")
    state = ort.allocate(1, 32)
    assert not state._native.verifies
    fill(ort, state, 0, 5)
    state.decode(1)
    with pytest.raises(ValueError, match="takes a build with native kernels"):
        state.verify([[1]])


def test_a_cancelled_state_gives_nothing(bundle) -> None:
    decoder = opened(bundle, "cpu-int4-native")
    state = decoder.allocate(1, 64)
    fill(decoder, state, 0, 10)
    state.decode(1)
    state.cancel()
    assert state.verify([[1, 2]])[0].tokens == []
    assert state.lengths == [10]
