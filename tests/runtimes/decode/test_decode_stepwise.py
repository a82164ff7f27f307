"""The token loop in Python against transformers' `generate`, and against the native sampler where both can."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_language_model import EOS, VOCAB, ToyState, toy_model

from vlm_edge_runtime import _native
from vlm_edge_runtime.decode.options import GenerationDefaults
from vlm_edge_runtime.decode.processors import log_softmax
from vlm_edge_runtime.decode.stepwise import StepRow, StepwiseLoop, guided

LIMIT = 14


def prompts(count):
    return [np.random.default_rng(seed).integers(6, VOCAB, 3 + seed % 4).tolist() for seed in range(count)]


def options(**keywords):
    return GenerationDefaults({}, [EOS], VOCAB).resolve(1, keywords)


def answers(model, batch, wanted, seeds=None, limit=LIMIT, chunk=3):
    """Every row's tokens, as the session's run drives the loop; the guides follow the rows."""
    controls = wanted.controls
    everything = [*batch, *([prompt[-1:] for prompt in batch] if controls.guided else [])]
    state = ToyState(model, len(everything))
    rows = []
    for number, prompt in enumerate(everything):
        state.fill(number, prompt)
        state.start(number)
    for number, prompt in enumerate(batch):
        params = wanted.for_row(number, len(prompt), limit)
        processors = controls.processors(params, len(prompt), prompt, beams=False)
        guide = len(batch) + number if controls.guided else None
        rows.append(StepRow(np.array(prompt), params, processors, guide, controls.guidance_scale))
    loop, found, logprobs, done = StepwiseLoop(state, rows, lambda: False), [[] for _ in batch], [[] for _ in batch], set()
    while len(done) < len(batch):
        steps = min(chunk, *(limit - len(found[number]) for number in range(len(batch)) if number not in done))
        for number, new in enumerate(loop.decode(steps)):
            if number in done:
                assert not new.tokens
                continue
            found[number] += new.tokens
            logprobs[number] += new.logprobs
            if new.finished or len(found[number]) == limit:
                if not new.finished:
                    loop.drop(number)
                    state.truncate(number, state.lengths[number])
                done.add(number)
    return found, logprobs


def theirs(model, prompt, limit=LIMIT, **keywords):
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=limit, pad_token_id=0, **keywords)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "keywords",
    [
        {"exponential_decay_length_penalty": (3, 1.6)},
        {"encoder_repetition_penalty": 2.5},
        {"encoder_no_repeat_ngram_size": 1},
        {"encoder_no_repeat_ngram_size": 2, "no_repeat_ngram_size": 2, "repetition_penalty": 1.4},
        {"encoder_repetition_penalty": 0.5, "forced_eos_token_id": 9, "min_new_tokens": 6, "suppress_tokens": [3, 8]},
        {"guidance_scale": 1.7},
        {"guidance_scale": 0.0},
        {"guidance_scale": 3.0, "no_repeat_ngram_size": 1, "min_new_tokens": 5},
    ],
    ids=str,
)
def test_greedy_equals_transformers(keywords) -> None:
    model, batch = toy_model(1), prompts(6)
    found, _ = answers(model, batch, options(**keywords))
    for prompt, tokens in zip(batch, found, strict=True):
        assert tokens == theirs(model, prompt, **keywords)
    assert found != answers(model, batch, options(encoder_repetition_penalty=1.0, guidance_scale=1.0))[0]


def test_sampling_draws_what_the_native_sampler_draws() -> None:
    model, batch = toy_model(), prompts(4)
    wanted = options(temperature=1.3, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=[1], logprobs=2)
    found, logprobs = answers(model, batch, wanted)
    for prompt, tokens, scores in zip(batch, found, logprobs, strict=True):
        params = wanted.for_row(0, len(prompt), LIMIT)
        sampler, state = _native.Sampler(VOCAB, params), ToyState(model, 1)
        state.fill(0, prompt)
        state.start(0)
        for token in prompt:
            sampler.accept(token)
        for token, score in zip(tokens, scores, strict=True):
            chosen, logprob, _ = sampler.choose(state.logits(0))
            assert chosen == token and score == pytest.approx(logprob, abs=1e-5)
            sampler.accept(token)
            state.push(0, token)
            state.decode(1)


@pytest.mark.parametrize("name", ["typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"])
def test_rarer_filters_keep_to_their_tokens(name) -> None:
    value = {"typical_p": 0.3, "epsilon_cutoff": 0.2, "eta_cutoff": 0.5, "top_h": 0.2}[name]
    plain, _ = answers(toy_model(), prompts(3), options(temperature=2.0, seed=4))
    found, _ = answers(toy_model(), prompts(3), options(temperature=2.0, seed=4, **{name: value}))
    again, _ = answers(toy_model(), prompts(3), options(temperature=2.0, seed=4, **{name: value}), chunk=1)
    assert found == again != plain


def test_guidance_of_scale_one_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    given, free = (rng.standard_normal((2, 50)) * 4).astype(np.float32)
    np.testing.assert_allclose(guided(given, free, 1.0), log_softmax(given), atol=2e-6)
    np.testing.assert_allclose(guided(given, free, 0.0), log_softmax(free), atol=2e-6)


def test_cancel_between_steps() -> None:
    cancelled: list[bool] = []
    state = ToyState(toy_model(), 1)
    state.fill(0, [1, 9, 17])
    state.start(0)
    loop = StepwiseLoop(state, [StepRow(np.array([1, 9, 17]), options().sampling)], lambda: len(cancelled) > 0)
    assert len(loop.decode(2)[0].tokens) == 2
    cancelled.append(True)
    assert loop.decode(2)[0].tokens == []
