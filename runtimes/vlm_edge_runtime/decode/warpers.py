"""Filters of the distribution that a token is drawn from, each as transformers defines it: see `processors` for how they run.

Each keeps at least `keep` tokens, the most likely ones (beam sampling needs more than one).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .processors import Ids, Scores, log_softmax, softmax

_TOP_H_CANDIDATES = 100  # transformers' cap on the tokens that top-h looks at


@dataclass(slots=True, frozen=True)
class Temperature:
    """Scores divided by `value` > 0."""

    value: float

    def __call__(self, ids: Ids, scores: Scores) -> None:
        with np.errstate(over="ignore"):  # a forbidden token may already have the lowest number there is
            scores /= np.float32(self.value)


@dataclass(slots=True, frozen=True)
class TopK:
    """The `count` most likely tokens, and those that tie with the last of them."""

    count: int
    keep: int = 1

    def __call__(self, ids: Ids, scores: Scores) -> None:
        count = min(max(self.count, self.keep), len(scores))
        scores[scores < np.partition(scores, -count)[-count]] = -np.inf


@dataclass(slots=True, frozen=True)
class TopP:
    """Nucleus sampling (Holtzman et al., arXiv 1904.09751): the shortest head of the ranking whose mass reaches `mass`."""

    mass: float
    keep: int = 1

    def __call__(self, ids: Ids, scores: Scores) -> None:
        order = np.argsort(scores, kind="stable")
        below = np.cumsum(softmax(scores)[order])
        removed = below <= 1 - self.mass
        removed[len(removed) - self.keep :] = False
        scores[order[removed]] = -np.inf


@dataclass(slots=True, frozen=True)
class TopH:
    """Entropy-bounded head of the ranking (Potraghloo et al., arXiv 2509.02510): tokens until their entropy passes a share."""

    share: float

    def __call__(self, ids: Ids, scores: Scores) -> None:
        head = _ranking(scores)[:_TOP_H_CANDIDATES]
        logarithms = log_softmax(scores[head]).astype(np.float64)
        terms = -np.exp(logarithms) * np.where(np.isfinite(logarithms), logarithms, 0.0)
        kept = np.cumsum(terms) <= terms.sum() * self.share
        kept[0] = True
        removed = np.ones(len(scores), dtype=bool)
        removed[head[kept]] = False
        scores[removed] = -np.inf


@dataclass(slots=True, frozen=True)
class MinP:
    """Tokens at least `share` times as likely as the most likely one (Nguyen et al., arXiv 2407.01082)."""

    share: float
    keep: int = 1

    def __call__(self, ids: Ids, scores: Scores) -> None:
        probabilities = softmax(scores)
        removed = probabilities < self.share * probabilities.max()
        removed[_ranking(scores)[: self.keep]] = False
        scores[removed] = -np.inf


@dataclass(slots=True, frozen=True)
class Typical:
    """Locally typical sampling (Meister et al., arXiv 2202.00666): tokens whose information is nearest to the entropy."""

    mass: float
    keep: int = 1

    def __call__(self, ids: Ids, scores: Scores) -> None:
        logarithms = log_softmax(scores).astype(np.float64)
        probabilities = np.exp(logarithms)
        entropy = -np.sum(probabilities * np.where(np.isfinite(logarithms), logarithms, 0.0))
        distance = np.abs(-logarithms - entropy)
        order = np.argsort(distance, kind="stable")
        last = min(int(np.sum(np.cumsum(probabilities[order]) < self.mass)), len(scores) - 1)
        removed = distance > distance[order[last]]
        removed[order[: self.keep]] = False
        scores[removed] = -np.inf


@dataclass(slots=True, frozen=True)
class Epsilon:
    """No token less likely than `cutoff` (Hewitt et al., arXiv 2210.15191, section 3.2).

    `eta`: the cut-off falls with the entropy, min(ε, √ε · exp(−entropy)) (the same, section 3.3).
    """

    cutoff: float
    keep: int = 1
    eta: bool = False

    def __call__(self, ids: Ids, scores: Scores) -> None:
        probabilities, cutoff = softmax(scores), self.cutoff
        if self.eta:
            logarithms = log_softmax(scores).astype(np.float64)
            entropy = -np.sum(probabilities * np.where(np.isfinite(logarithms), logarithms, 0.0))
            cutoff = min(cutoff, float(np.sqrt(cutoff) * np.exp(-entropy)))
        keep = min(self.keep, len(scores))
        scores[(probabilities < cutoff) & (scores < np.partition(scores, -keep)[-keep])] = -np.inf


def _ranking(scores: Scores) -> npt.NDArray[np.int64]:
    """Tokens, the most likely first; the lower one first among equals."""
    return np.argsort(-scores, kind="stable")
