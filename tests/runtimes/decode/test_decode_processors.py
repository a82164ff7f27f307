"""Each processor and warper against transformers' class on the same scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from vlm_edge_runtime.decode import processors as ours
from vlm_edge_runtime.decode import warpers

VOCAB = 211
EOS = (7, 30)
PROMPT = 5
SOURCE = [4, 9, 9, 3, 12, 4, 9, 1]


def _scores(seed: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scores = (rng.standard_normal(VOCAB) * (0.5 if kind == "flat" else 3)).astype(np.float32)
    if kind == "masked":
        scores[rng.integers(0, VOCAB, 60)] = -np.inf
    return ours.log_softmax(scores) if kind == "log" else scores


def _ids(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed + 99).integers(0, 8, length)


def _check(mine, reference, length: int = 20, kinds=("hot", "flat", "log", "masked"), shows: bool = True) -> None:
    changed = 0
    for seed in range(12):
        for kind in kinds:
            scores, ids = _scores(seed, kind), _ids(seed, length)
            expected = reference(torch.from_numpy(ids)[None], torch.from_numpy(scores.copy())[None])[0].numpy()
            found = ours.apply([mine], ids, scores)
            np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
            np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
            changed += not np.array_equal(found, scores)
    assert changed or not shows


BIASES = {(3,): 2.0, (1, 4): -7.5, (2, 1, 5): 4.0, (6, 5): float("-inf"), (0, 5): 1.0}


@pytest.mark.parametrize("length", [1, 4, 20, 60])
def test_sequences(length) -> None:
    _check(ours.SequenceBias(tuple(BIASES.items())), theirs.SequenceBiasLogitsProcessor(dict(BIASES)), length)
    bad = [[3], [1, 4], [2, 1], [5, 5, 5], [*range(30)]]
    never = tuple((tuple(word), float("-inf")) for word in bad)
    _check(ours.SequenceBias(never), theirs.NoBadWordsLogitsProcessor(bad, list(EOS)), length)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition(penalty) -> None:
    _check(ours.RepetitionPenalty(penalty), theirs.RepetitionPenaltyLogitsProcessor(penalty))
    source = torch.tensor([SOURCE])
    _check(ours.RepetitionPenalty(1 / penalty, tuple(SOURCE)), theirs.EncoderRepetitionPenaltyLogitsProcessor(penalty, source))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 9, 40])
def test_ngrams(size, length) -> None:
    _check(ours.NoRepeatNGram(size), theirs.NoRepeatNGramLogitsProcessor(size), length, shows=False)
    if length >= size:
        source = torch.tensor([SOURCE])
        reference = theirs.EncoderNoRepeatNGramLogitsProcessor(size, source)
        _check(ours.NoRepeatNGram(size, tuple(SOURCE)), reference, length, shows=False)


@pytest.mark.parametrize(("length", "least"), [(9, 10), (10, 10), (6, 12)])
def test_min_length(length, least) -> None:
    eos = torch.tensor(EOS)
    _check(ours.MinLength(least, EOS), theirs.MinLengthLogitsProcessor(least, eos), length, shows=False)
    new = theirs.MinNewTokensLengthLogitsProcessor(PROMPT, least - PROMPT, eos)
    _check(ours.MinLength(least, EOS), new, length, shows=False)


@pytest.mark.parametrize("length", [1, 2, 14, 15])
def test_forced(length) -> None:
    _check(ours.Forced(1, (9,)), theirs.ForcedBOSTokenLogitsProcessor(9), length, shows=False)
    _check(ours.Forced(14, EOS), theirs.ForcedEOSTokenLogitsProcessor(15, list(EOS)), length, shows=False)


def test_invalid_values() -> None:
    scores = _scores(0, "hot")
    scores[[1, 2, 3]] = [np.nan, np.inf, -np.inf]
    expected = theirs.InfNanRemoveLogitsProcessor()(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(scores.copy())[None])
    np.testing.assert_array_equal(ours.apply([ours.RemoveInvalid()], _ids(0, 3), scores), expected[0].numpy())


@pytest.mark.parametrize("length", [PROMPT + 3, PROMPT + 4, PROMPT + 5, PROMPT + 9])
def test_exponential_decay(length) -> None:
    reference = theirs.ExponentialDecayLengthPenalty((4, 1.4), list(EOS), PROMPT)
    _check(ours.ExponentialDecay(PROMPT + 4, 1.4, EOS), reference, length, shows=length > PROMPT + 4)


@pytest.mark.parametrize("length", [PROMPT, PROMPT + 1])
def test_suppress(length) -> None:
    banned = (3, 8, 150)
    _check(ours.Suppress(banned), theirs.SuppressTokensLogitsProcessor(banned), length)
    reference = theirs.SuppressTokensAtBeginLogitsProcessor(banned, PROMPT)
    _check(ours.Suppress(banned, PROMPT), reference, length, shows=length == PROMPT)


def test_normalisation() -> None:
    _check(ours.Normalise(), theirs.LogitNormalization(), shows=False)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_warpers(keep) -> None:
    pairs = [
        (warpers.Temperature(0.7), theirs.TemperatureLogitsWarper(0.7)),
        (warpers.TopK(2, keep), theirs.TopKLogitsWarper(2, min_tokens_to_keep=keep)),
        (warpers.TopK(900, keep), theirs.TopKLogitsWarper(900, min_tokens_to_keep=keep)),
        (warpers.TopP(0.8, keep), theirs.TopPLogitsWarper(0.8, min_tokens_to_keep=keep)),
        (warpers.TopP(0.05, keep), theirs.TopPLogitsWarper(0.05, min_tokens_to_keep=keep)),
        (warpers.TopH(0.4), theirs.TopHLogitsWarper(0.4)),
        (warpers.MinP(0.1, keep), theirs.MinPLogitsWarper(0.1, min_tokens_to_keep=keep)),
        (warpers.MinP(1.0, keep), theirs.MinPLogitsWarper(1.0, min_tokens_to_keep=keep)),
        (warpers.Typical(0.5, keep), theirs.TypicalLogitsWarper(0.5, min_tokens_to_keep=keep)),
        (warpers.Typical(0.95, keep), theirs.TypicalLogitsWarper(0.95, min_tokens_to_keep=keep)),
        (warpers.Epsilon(0.01, keep), theirs.EpsilonLogitsWarper(0.01, min_tokens_to_keep=keep)),
        (warpers.Epsilon(0.9, keep), theirs.EpsilonLogitsWarper(0.9, min_tokens_to_keep=keep)),
        (warpers.Epsilon(0.05, keep, eta=True), theirs.EtaLogitsWarper(0.05, min_tokens_to_keep=keep)),
    ]
    for mine, reference in pairs:
        _check(mine, reference, shows=False)


def test_warpers_remove_something() -> None:
    for warper in (warpers.TopK(2), warpers.TopP(0.8), warpers.TopH(0.4), warpers.MinP(0.1), warpers.Typical(0.5)):
        assert np.isneginf(ours.apply([warper], _ids(0, 3), _scores(0, "hot"))).any(), warper
    for eta in (False, True):
        assert np.isneginf(ours.apply([warpers.Epsilon(0.01, eta=eta)], _ids(0, 3), _scores(0, "hot"))).any()
