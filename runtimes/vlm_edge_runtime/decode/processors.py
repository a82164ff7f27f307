"""Logits processors: rules and penalties that change the scores of the next token, each as transformers defines it.

The common ones are in the native sampler too (`engines.base.SamplingParams`); these serve the token loops that choose in
Python: beam search and `stepwise`. A processor takes the row's tokens so far, int64 [n], the prompt's among them, and changes
the scores, float32 [vocab], in place. Lengths count the prompt's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]

_LARGEST = np.finfo(np.float32).max


class Processor(Protocol):
    """Changes `scores` in place."""

    def __call__(self, ids: Ids, scores: Scores) -> None: ...


def log_softmax(scores: Scores) -> Scores:
    """Log probabilities; sums in float64, so that they do not depend on the vocabulary's size."""
    largest = scores.max()
    if not np.isfinite(largest):
        # All −∞ stays so; +∞ and NaN give NaN, as the definition does.
        return scores - largest if largest != -np.inf else scores.copy()
    shifted = scores.astype(np.float64) - float(largest)
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), dtype=np.float32)


def softmax(scores: Scores) -> npt.NDArray[np.float64]:
    """Probabilities, float64."""
    weights = np.exp(scores.astype(np.float64) - float(scores.max()))
    return np.asarray(weights / weights.sum())


@dataclass(slots=True, frozen=True)
class SequenceBias:
    """Adds a bias to the last token of each (sequence, bias) whose other tokens the text ends with (−∞: a bad word)."""

    biases: tuple[tuple[tuple[int, ...], float], ...]

    def __call__(self, ids: Ids, scores: Scores) -> None:
        total: dict[int, float] = {}
        for sequence, bias in self.biases:
            before = sequence[:-1]
            if len(before) <= len(ids) and tuple(ids[len(ids) - len(before) :].tolist()) == before:
                total[sequence[-1]] = total.get(sequence[-1], 0.0) + bias
        for token, bias in total.items():
            scores[token] += np.float32(bias)


@dataclass(slots=True, frozen=True)
class RepetitionPenalty:
    """CTRL's penalty (Keskar et al., arXiv 1909.05858, section 4.1) for tokens that are there already.

    With `tokens` it looks at those instead of the text: the prompt of an encoder-decoder, rewarded by 1 / penalty.
    """

    penalty: float
    tokens: tuple[int, ...] | None = None

    def __call__(self, ids: Ids, scores: Scores) -> None:
        seen = np.unique(ids if self.tokens is None else np.asarray(self.tokens, dtype=np.int64))
        seen = seen[(seen >= 0) & (seen < len(scores))]
        found, penalty = scores[seen], np.float32(self.penalty)
        scores[seen] = np.where(found < 0, found * penalty, found / penalty)


@dataclass(slots=True, frozen=True)
class NoRepeatNGram:
    """Forbids each token that would complete an n-gram of the text a second time (Paulus et al., arXiv 1705.04304, section 2.5).

    With `source` the n-grams are that text's: nothing may be copied from the encoder's input.
    """

    size: int
    source: tuple[int, ...] | None = None

    def __call__(self, ids: Ids, scores: Scores) -> None:
        text = ids if self.source is None else np.asarray(self.source, dtype=np.int64)
        if len(text) < self.size or len(ids) < self.size - 1:
            return
        windows = np.lib.stride_tricks.sliding_window_view(text, self.size)
        last = ids[len(ids) - self.size + 1 :]
        completing = windows[(windows[:, :-1] == last).all(axis=1), -1]
        scores[completing[(completing >= 0) & (completing < len(scores))]] = -np.inf


@dataclass(slots=True, frozen=True)
class MinLength:
    """No end-of-sequence token before `length` tokens are there."""

    length: int
    eos: tuple[int, ...]

    def __call__(self, ids: Ids, scores: Scores) -> None:
        if len(ids) < self.length:
            scores[list(self.eos)] = -np.inf


@dataclass(slots=True, frozen=True)
class Forced:
    """When `length` tokens are there, one of these comes next."""

    length: int
    tokens: tuple[int, ...]

    def __call__(self, ids: Ids, scores: Scores) -> None:
        if len(ids) == self.length:
            scores[:] = -np.inf
            scores[list(self.tokens)] = 0.0


@dataclass(slots=True, frozen=True)
class RemoveInvalid:
    """NaN becomes 0, infinities the largest numbers."""

    def __call__(self, ids: Ids, scores: Scores) -> None:
        np.nan_to_num(scores, copy=False, nan=0.0, posinf=float(_LARGEST), neginf=-float(_LARGEST))


@dataclass(slots=True, frozen=True)
class ExponentialDecay:
    """From `start` tokens on, end-of-sequence tokens gain |score| · (factor^k − 1) at the k-th further token."""

    start: int
    factor: float
    eos: tuple[int, ...]

    def __call__(self, ids: Ids, scores: Scores) -> None:
        if len(ids) > self.start:
            eos = list(self.eos)
            gain = np.abs(scores[eos]) * np.float32(self.factor ** (len(ids) - self.start) - 1)
            scores[eos] += np.where(np.isfinite(scores[eos]), gain, np.float32(0))


@dataclass(slots=True, frozen=True)
class Suppress:
    """Never these tokens; with `length`, only when so many tokens are there."""

    tokens: tuple[int, ...]
    length: int | None = None

    def __call__(self, ids: Ids, scores: Scores) -> None:
        if self.length is None or len(ids) == self.length:
            scores[list(self.tokens)] = -np.inf


@dataclass(slots=True, frozen=True)
class Normalise:
    """Log probabilities again, after everything else (`renormalize_logits`)."""

    def __call__(self, ids: Ids, scores: Scores) -> None:
        scores[:] = log_softmax(scores)


def apply(processors: Sequence[Processor], ids: Ids, scores: Scores) -> Scores:
    """A processed copy of the scores."""
    changed = scores.copy()
    for processor in processors:
        processor(ids, changed)
    return changed
