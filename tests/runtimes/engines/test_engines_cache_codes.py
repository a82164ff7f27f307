"""The engine on a KV cache in 8 bits: rows, prefixes, drafts and beams as on one of floats, and what trained models answer."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from vlm_edge.targets.build import build
from vlm_edge_runtime import load
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.engines import EngineOptions, SamplingParams, open_engine

GREEDY = SamplingParams(eos_token_ids=())


def made(name: str, portable_bundle, root: Path) -> Path:
    """The bundle with 4-bit weights, its cache in 8 bits (`codes`) and in float16 (`floats`)."""
    path = root / f"{name}.vlm"
    shutil.copytree(portable_bundle(name), path)
    build(path, "cpu-int4", name="floats")
    build(path, "cpu-int4", kv="int8", name="codes")
    return path


@pytest.fixture(scope="module")
def bundle(portable_bundle, tmp_path_factory) -> Path:
    return made("tiny-smolvlm", portable_bundle, tmp_path_factory.mktemp("codes"))


@pytest.fixture(scope="module")
def decoder(bundle):
    return opened(bundle)


def opened(bundle: Path, threads: int = 2, name: str = "codes"):
    return open_engine(open_bundle(bundle, build=name), options=EngineOptions(threads=threads)).decoder()


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 100, count)


def fill(decoder, state, row: int, ids: np.ndarray, *, start: bool = False, **params) -> None:
    at = state.lengths[row]
    state.prefill(row, decoder.embed(ids), np.arange(at, at + len(ids)))
    if start:
        state.start(row, SamplingParams(eos_token_ids=(), **params), ids, at + len(ids))


def continued(decoder, state, row: int, ids) -> np.ndarray:
    """Logits after tokens that run one by one."""
    for one in ids:
        state.push(row, int(one))
        state.logits(row)
    return state.logits(row)


def test_a_prompt_in_chunks_is_the_whole_prompt(decoder):
    """What is read is what was written, whoever wrote it: bit for bit, as the blocks of keys begin at the same places."""
    ids, found = tokens(300), []
    for cuts in ((300,), (70, 230), (128, 172), (30, 2, 50, 218)):
        state, at = decoder.allocate(1, 320), 0
        for count in cuts:
            fill(decoder, state, 0, ids[at : at + count])
            at += count
        found.append(state.logits(0).copy())
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_rewinding_copies_and_reordering_keep_scales_with_their_codes(decoder):
    ids, more, other = tokens(90), tokens(7, 1), tokens(40, 2)
    plain = decoder.allocate(1, 128)
    fill(decoder, plain, 0, ids[:80])
    fill(decoder, plain, 0, ids[80:], start=True)
    wanted = continued(decoder, plain, 0, more).copy()

    state = decoder.allocate(3, 128)
    fill(decoder, state, 1, other, start=True)  # neighbours that are longer and shorter
    fill(decoder, state, 0, ids, start=True)
    continued(decoder, state, 0, tokens(20, 3))

    def rewound(row: int) -> None:
        state.truncate(row, 80)
        fill(decoder, state, row, ids[80:], start=True)
        np.testing.assert_array_equal(continued(decoder, state, row, more), wanted)

    rewound(0)
    state.copy_prefix(2, state, 0, 80)
    rewound(2)
    state.reorder([1, 2, 0])
    rewound(1)
    rewound(2)


def decoded(decoder, prompts, count: int):
    state = decoder.allocate(len(prompts), 700)
    for row, length in enumerate(prompts):
        fill(decoder, state, row, tokens(length, row), start=True, logprobs=decoder.vocab_size)
    return state, state.decode(count)


@pytest.mark.parametrize("prompt", [3, 55, 505])
def test_drafts_change_no_bit_of_any_token(decoder, prompt):
    _, (wanted,) = decoded(decoder, [prompt], 24)
    state = decoder.allocate(1, 700)
    fill(decoder, state, 0, tokens(prompt), start=True, logprobs=decoder.vocab_size)
    (found,) = state.verify([[]])
    while len(found.tokens) < 24:
        done, left = len(found.tokens), 24 - len(found.tokens)
        right = wanted.tokens[done : done + 9]
        proposed = [right, [*right[:2], (right[0] + 1) % decoder.vocab_size], [5]][done % 3][: left - 1]
        (new,) = state.verify([proposed])
        found.tokens += new.tokens
        found.logprobs += new.logprobs
        found.top_logprobs += new.top_logprobs
    assert found.tokens == wanted.tokens
    assert found.logprobs == wanted.logprobs, "the same bits"
    assert found.top_logprobs == wanted.top_logprobs


def test_rows_and_threads_change_no_bit(bundle, decoder):
    _, together = decoded(decoder, [12, 130, 40], 12)
    for row, length in enumerate([12, 130, 40]):
        state = decoder.allocate(1, 700)
        fill(decoder, state, 0, tokens(length, row), start=True, logprobs=decoder.vocab_size)
        (alone,) = state.decode(12)
        assert (alone.tokens, alone.logprobs) == (together[row].tokens, together[row].logprobs)
    for threads in (1, 3):
        _, again = decoded(opened(bundle, threads), [12, 130, 40], 12)
        assert [(row.tokens, row.logprobs) for row in again] == [(row.tokens, row.logprobs) for row in together]


def test_beams_and_kept_prefixes(bundle, scene):
    """A prompt whose prefix is kept is answered as if it were run again; beams are the same on any number of threads."""
    picture, answer = scene
    found = []
    for threads in (1, 2):
        with load(bundle, build="codes", threads=threads) as vlm:
            first = vlm.generate("what do you see?", images=[picture], max_new_tokens=20, temperature=0.0).text.strip()
            beams = vlm.generate("what do you see?", images=[picture], max_new_tokens=12, num_beams=3).text
            again = vlm.generate("what do you see?", images=[picture], max_new_tokens=20, temperature=0.0).text.strip()
            assert vlm.stats.reused_tokens > 0
            assert first == again
            found.append((first, beams))
    assert found[0] == found[1]
    assert found[0][0] == answer


@pytest.mark.slow
def test_accuracy_is_pytorchs_within_a_point(portable_bundle, tmp_path):
    """128 held-out questions: the portable graphs (PyTorch's answers), and 4-bit weights with a cache in 8 bits."""
    from benchmarks.train import scenes

    examples = scenes.held_out_examples(128, seed=11)
    for name in ("tiny-llava", "tiny-smolvlm"):
        path, right = made(name, portable_bundle, tmp_path), {}
        for chosen in (None, "codes"):
            with load(path, build=chosen) as vlm:
                answers = [
                    vlm.generate(one.prompt, images=[one.image], max_new_tokens=40, temperature=0.0).text for one in examples
                ]
            right[chosen] = sum(text.strip() == one.answer for text, one in zip(answers, examples, strict=True))
        assert right["codes"] >= right[None] - 0.01 * len(examples), (name, right)
