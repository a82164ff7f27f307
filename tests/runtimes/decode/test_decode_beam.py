"""Beam search against transformers' `generate` on the same logits: tokens, and scores to 1e-5."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from toy_language_model import EOS, VOCAB, ToyState, toy_model

from vlm_edge_runtime import _native
from vlm_edge_runtime.decode.beam import BeamLoop, BeamOptions, BeamSearch, largest
from vlm_edge_runtime.decode.processors import Forced, MinLength, NoRepeatNGram, RepetitionPenalty, SequenceBias, Suppress
from vlm_edge_runtime.errors import DeviceError

PROMPT = [1, 9, 17, 33]
MANY_EOS = [5, 11, 40, 2]


def filled(model, batch, width):
    state = ToyState(model, len(batch) * width)
    for row in range(state.batch):
        state.fill(row, batch[row // width])
        state.start(row)
    return state


def ours(model, prompt, options, limit, eos=(EOS,), processors=(), **more):
    search = BeamSearch(options, np.array(prompt), limit, eos, processors, **more)
    loop = BeamLoop(filled(model, [prompt], options.num_beams), [search], lambda: False)
    while not search.done:
        (row,) = loop.decode(3)
    assert row.finished and row.tokens == loop.hypotheses(0)[0].tokens
    assert loop.decode(3)[0].tokens == []
    return loop.hypotheses(0)


def theirs(model, prompt, options, limit, eos=EOS, **more):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=options.sampled,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        early_stopping=options.early_stopping,
        num_return_sequences=options.num_return_sequences,
        max_new_tokens=limit,
        eos_token_id=eos,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **more,
    )
    lengths = (out.beam_indices >= 0).sum(1).tolist()
    rows = out.sequences[:, len(prompt) :].tolist()
    return [row[:length] for row, length in zip(rows, lengths, strict=True)], out.sequences_scores.tolist()


def same(found, expected) -> None:
    sequences, scores = expected
    assert [one.tokens for one in found] == sequences
    np.testing.assert_allclose([one.score for one in found], scores, rtol=1e-5, atol=1e-5)


def prompts(count):
    return [np.random.default_rng(seed).integers(6, VOCAB, 3 + seed % 4).tolist() for seed in range(count)]


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_same_sequences_and_scores(beams, length_penalty, early_stopping) -> None:
    lengths = set()
    for seed, prompt in enumerate(prompts(3)):
        options = BeamOptions(beams, length_penalty, early_stopping, num_return_sequences=1 + seed % beams)
        found = ours(toy_model(seed % 3), prompt, options, 12)
        same(found, theirs(toy_model(seed % 3), prompt, options, 12))
        lengths |= {len(one.tokens) for one in found}
    assert len(lengths) > 1 or length_penalty > 0  # some end early, unless length is rewarded


@pytest.mark.parametrize("limit", [1, 2, 5, 20])
@pytest.mark.parametrize("eos", [EOS, MANY_EOS, None])
def test_limits_and_several_ends(limit, eos) -> None:
    listed = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    for seed, prompt in enumerate(prompts(5)):
        options = BeamOptions(4, num_return_sequences=4)
        model = toy_model(seed % 3)
        model.generation_config.eos_token_id = None if eos is None else EOS
        try:
            same(ours(model, prompt, options, limit, listed), theirs(model, prompt, options, limit, eos))
        finally:
            model.generation_config.eos_token_id = EOS


def test_many_likely_ends() -> None:
    """Most of the best continuations are ends: enough others must stand by, and only the first ones may finish."""
    bias = {(token,): 9.0 for token in MANY_EOS}
    for seed, prompt in enumerate(prompts(5)):
        options = BeamOptions(3, 2.0, "never", num_return_sequences=3)
        found = ours(toy_model(seed % 3), prompt, options, 8, MANY_EOS, [SequenceBias(tuple(bias.items()))])
        same(found, theirs(toy_model(seed % 3), prompt, options, 8, MANY_EOS, sequence_bias=bias))


def test_enough_continuations_stand_by() -> None:
    """Three ends are the best tokens of all: both beams still go on, with the best others."""
    search = BeamSearch(BeamOptions(2), np.array([9]), 5, (0, 1, 2))
    logits = np.array([[9, 8, 7, 6, 5, 4, 3, 2]] * 2, np.float32)
    search.advance(logits)
    assert search.tokens.tolist() == [3, 4] and search.sources.tolist() == [0, 0]


CONTROLLED = [
    ({"no_repeat_ngram_size": 2}, lambda start, limit: [NoRepeatNGram(2)]),
    ({"repetition_penalty": 1.7}, lambda start, limit: [RepetitionPenalty(1.7)]),
    ({"min_new_tokens": 6}, lambda start, limit: [MinLength(start + 6, (EOS,))]),
    ({"min_length": 9}, lambda start, limit: [MinLength(9, (EOS,))]),
    ({"forced_eos_token_id": EOS}, lambda start, limit: [Forced(start + limit - 1, (EOS,))]),
    ({"forced_eos_token_id": 8}, lambda start, limit: [Forced(start + limit - 1, (8,))]),
    ({"suppress_tokens": [3, 7, 20, 21, 22]}, lambda start, limit: [Suppress((3, 7, 20, 21, 22))]),
    ({"begin_suppress_tokens": [*range(0, 48, 2)]}, lambda start, limit: [Suppress(tuple(range(0, 48, 2)), start)]),
    ({"bad_words_ids": [[9], [17, 3]]}, lambda start, limit: [SequenceBias((((9,), -np.inf), ((17, 3), -np.inf)))]),
    (
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 4, "forced_eos_token_id": EOS},
        lambda start, limit: [
            RepetitionPenalty(1.3),
            NoRepeatNGram(3),
            MinLength(start + 4, (EOS,)),
            Forced(start + limit - 1, (EOS,)),
        ],
    ),
]


@pytest.mark.parametrize(("options", "processors"), CONTROLLED, ids=[str(options) for options, _ in CONTROLLED])
def test_with_processors(options, processors) -> None:
    for seed, prompt in enumerate(prompts(4)):
        beams = BeamOptions(2 + seed % 3, 1.0, early_stopping=bool(seed % 2), num_return_sequences=2)
        found = ours(toy_model(seed % 3), prompt, beams, 12, processors=processors(len(prompt), 12))
        same(found, theirs(toy_model(seed % 3), prompt, beams, 12, **options))


def test_a_forced_first_token() -> None:
    """The prompt of an encoder-decoder's decoder is one token: all beams must take the forced one."""
    beams = BeamOptions(3, num_return_sequences=3)
    found = ours(toy_model(), [1], beams, 8, processors=[Forced(1, (12,))])
    same(found, theirs(toy_model(), [1], beams, 8, forced_bos_token_id=12))
    assert all(one.tokens[0] == 12 for one in found)


def test_beam_sampling(monkeypatch) -> None:
    """The same draws in the same places give the same sequences."""
    from vlm_edge_runtime.decode.warpers import Temperature, TopK

    for seed, prompt in enumerate(prompts(6)):
        count = itertools.count()

        def drawn(weights, num_samples, counter=count, stream=seed):
            left, picked = weights[0].double().numpy().copy(), []
            for _ in range(num_samples):
                target = _native.uniform(stream, next(counter)) * left.sum()
                picked.append(int(np.searchsorted(np.cumsum(left), target, side="right")))
                left[picked[-1]] = 0
            return torch.tensor([picked])

        options = BeamOptions(3, num_return_sequences=2, sampled=True)
        processors = [Temperature(1.4), TopK(20, 2)]
        found = ours(toy_model(), prompt, options, 8, processors=processors, seed=seed)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "multinomial", drawn)
            same(found, theirs(toy_model(), prompt, options, 8, temperature=1.4, top_k=20))


def test_sampling_where_few_tokens_are_left() -> None:
    """Fewer tokens than candidates: the rest are taken by score, and the search goes on."""
    from vlm_edge_runtime.decode.warpers import TopK

    found = ours(toy_model(), PROMPT, BeamOptions(4, sampled=True), 6, processors=[TopK(1)], seed=3)
    assert len(found[0].tokens) <= 6


def test_a_stop_check_ends_beams() -> None:
    def stops(tokens) -> bool:
        return int(tokens[-1]) in (11, 40)

    for prompt in prompts(4):
        options = BeamOptions(3, num_return_sequences=3)
        found = ours(toy_model(), prompt, options, 12, (EOS,), stops=stops)
        # A set of ends that is looked at elsewhere: the number of candidates differs, the found ones need not.
        expected = ours(toy_model(), prompt, options, 12, (EOS, 11, 40))
        assert found[0].tokens == expected[0].tokens


def test_prompts_of_a_batch_do_not_disturb_one_another() -> None:
    options, batch = BeamOptions(3, num_return_sequences=2), prompts(5)
    limits = [12, 3, 20, 1, 7]
    searches = [BeamSearch(options, np.array(prompt), limit, (EOS,)) for prompt, limit in zip(batch, limits, strict=True)]
    state = filled(toy_model(), batch, 3)
    loop, answers = BeamLoop(state, searches, lambda: False), [[] for _ in batch]
    while not all(search.done for search in searches):
        for answer, row in zip(answers, loop.decode(4), strict=True):
            answer += row.tokens
    for number, (prompt, limit) in enumerate(zip(batch, limits, strict=True)):
        same(loop.hypotheses(number), theirs(toy_model(), prompt, options, limit))
        assert answers[number] == loop.hypotheses(number)[0].tokens
        assert max(state.lengths[3 * number : 3 * number + 3]) <= len(prompt) + limit
    assert loop.steps == state.runs + 1 == max(search.length for search in searches)


def test_cancel_and_what_there_is() -> None:
    cancelled: list[bool] = []
    loop = BeamLoop(
        filled(toy_model(), [PROMPT], 3), [BeamSearch(BeamOptions(3), np.array(PROMPT), 30, ())], lambda: bool(cancelled)
    )
    assert loop.decode(4)[0].tokens == []
    cancelled.append(True)
    assert loop.decode(4)[0].tokens == [] and loop.steps == 4
    assert len(loop.hypotheses(0)[0].tokens) == 4


def test_unusable_logits_are_an_error() -> None:
    class Broken(ToyState):
        def logits(self, row):
            return np.full(VOCAB, np.nan, np.float32)

    loop = BeamLoop(Broken(toy_model(), 2), [BeamSearch(BeamOptions(2), np.array(PROMPT), 5, (EOS,))], lambda: False)
    with pytest.raises(DeviceError, match="NaN"):
        loop.decode(1)


def test_largest() -> None:
    values = np.array([1, 5, 3, 5, 3, -np.inf, 3], np.float32)
    assert largest(values, 4).tolist() == [1, 3, 2, 4]
    assert largest(values, 9).tolist() == [1, 3, 2, 4, 6, 0, 5]
    assert largest(values, 0).tolist() == []
