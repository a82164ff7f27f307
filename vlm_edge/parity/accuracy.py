"""Task accuracy of both sides on the same questions, and what a loss means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm_edge_runtime.errors import ParityError

from .dataset import Dataset, Pair, Question, retrieval
from .examples import Example
from .report import AccuracyResult
from .subject import Encoder, Generator
from .tolerance import ACCURACY_POINTS, Verdict


def answers(side: Generator, dataset: Dataset, max_new_tokens: int) -> list[bool]:
    """Which questions a model answers rightly, greedily."""
    right = []
    for item in dataset:
        if not isinstance(item, Question):
            raise ParityError("This model answers questions; the dataset has captions (text). Give {image, prompt, answer}.")
        right.append(item.is_right(side.greedy(Example(item.images, item.prompt), max_new_tokens).text))
    return right


def retrievals(side: Encoder, dataset: Dataset) -> list[bool]:
    """Which pictures find their text, and which texts their picture."""
    images, texts = [], []
    for item in dataset:
        if not isinstance(item, Pair):
            raise ParityError("This model compares pictures with texts; the dataset has questions. Give {image, text}.")
        images.append(side.embed_images([item.image]))
        texts.append(side.embed_texts([item.text]))
    return retrieval(np.concatenate(images), np.concatenate(texts))


def judge_accuracy(
    found: Sequence[bool], reference: Sequence[bool], measure: str, *, allowed_points: float = ACCURACY_POINTS
) -> AccuracyResult:
    """FAIL when more than `allowed_points` percentage points are lost; AMBIGUOUS where that is a single answer."""
    if not reference or len(found) != len(reference):
        raise ParityError(f"{len(found)} answers against {len(reference)} of the reference: there is nothing to compare.")
    pairs = list(zip(found, reference, strict=True))
    lost = sum(before and not now for now, before in pairs)
    gained = sum(now and not before for now, before in pairs)
    result = AccuracyResult(
        verdict="PASS",
        measure=measure,
        examples=len(pairs),
        reference=sum(reference) / len(pairs),
        accuracy=sum(found) / len(pairs),
        lost=lost,
        gained=gained,
        tolerance_points=allowed_points,
    )
    if result.drop_points > allowed_points + 1e-9:
        verdict: Verdict = "AMBIGUOUS" if lost - gained <= 1 else "FAIL"
        result.verdict = verdict
        result.note = f"{result.drop_points:.1f} points lost ({lost} answers lost, {gained} gained), {allowed_points:g} allowed"
        if verdict == "AMBIGUOUS":
            result.note += f": one answer of {len(pairs)} weighs more than that; a larger dataset would tell"
    return result
