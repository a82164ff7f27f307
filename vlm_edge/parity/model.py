"""The whole model: preprocessing, logits along the reference's own answer, and free answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from vlm_edge_runtime.errors import ParityError

from .examples import Example
from .metrics import UNBOUNDED, Distance, apart, compare_step, distance, largest_value, worst
from .report import ForcedResult, LogitsResult, PreprocessingResult, TextResult, short
from .subject import Answer, Array, Floats, Generator, Prepared
from .tolerance import PREPROCESSING, Tolerance, Verdict

SCATTER = 12
"""Tokens per step that the page plots: the likeliest of the reference, where an error can change an answer."""


def compare_preprocessing(found: Sequence[Prepared], expected: Sequence[Prepared]) -> PreprocessingResult:
    """The same pixels (to rounding) and exactly the same tokens."""
    pixels = [_pixels(one.pixels, other.pixels) for one, other in zip(found, expected, strict=True)]
    differ = sum(not one.reads_like(other) for one, other in zip(found, expected, strict=True))
    return preprocessing_result(pixels, differ)


def preprocessing_result(pixels: Sequence[Distance], tokens_differ: int = 0) -> PreprocessingResult:
    """Judges preprocessing by the distances of the pixels of each example."""
    total = worst(pixels)
    said = []
    if not total.within(PREPROCESSING):
        wrong = sum(not one.within(PREPROCESSING) for one in pixels)
        why = total.note or f"relative difference {short(total.relative)}"
        said.append(f"pixel_values of {wrong} of {len(pixels)} examples differ ({why}): see preprocessor_config.json")
    if tokens_differ:
        said.append(f"the tokens of {tokens_differ} of {len(pixels)} prompts differ: see the tokenizer and the chat template")
    return PreprocessingResult(
        verdict="FAIL" if said else "PASS",
        tolerance=PREPROCESSING,
        distance=total,
        examples=len(pixels),
        tokens_differ=tokens_differ,
        note="; ".join(said),
    )


def compare_logits(
    subject: Generator,
    examples: Sequence[Example],
    answers: Sequence[Answer],
    expected: Sequence[Floats],
    tolerance: Tolerance,
    *,
    accuracy_decides: bool = False,
) -> LogitsResult:
    """Teacher forcing: both sides read each prompt and the reference's answer; their next-token logits are compared."""
    results: list[ForcedResult] = []
    for i, (example, answer, reference) in enumerate(zip(examples, answers, expected, strict=True)):
        found = _forced(subject, example, answer.tokens, reference)
        near = tolerance.near_tie(largest_value(reference))
        steps = [compare_step(row, other, near) for row, other in zip(reference, found, strict=True)]
        results.append(
            ForcedResult(example=i, words=subject.words(answer.tokens), steps=steps, scatter=_scatter(reference, found))
        )
    return judge_logits(results, tolerance, accuracy_decides=accuracy_decides)


def judge_logits(results: Sequence[ForcedResult], tolerance: Tolerance, *, accuracy_decides: bool = False) -> LogitsResult:
    """The verdict over all steps; see tolerance.py for what is allowed and why."""
    steps = [step for result in results for step in result.steps]
    if not steps:
        raise ParityError("There is no step to compare: give at least one example and max_new_tokens ≥ 1.")
    total = worst(step.distance for step in steps)
    flips = sum(step.flipped for step in steps)
    near = sum(step.near_tie for step in steps)
    decided = flips - near
    kl = [step.kl for step in steps]
    mean_kl = UNBOUNDED if max(kl) >= UNBOUNDED else float(np.mean(kl))
    verdict: Verdict = "PASS"
    said: list[str] = []
    if total.note:
        verdict, said = "FAIL", [total.note]
    elif not tolerance.quantised:
        assert tolerance.relative is not None  # what `quantised` means
        if not total.within(tolerance.relative):
            verdict, said = (
                "FAIL",
                [f"logits differ by {short(total.relative)} of the largest, {tolerance.relative:g} is allowed"],
            )
        if decided:
            verdict = "FAIL"
            said.append(f"{decided} first choices flipped where the reference had decided")
    else:
        if mean_kl > tolerance.mean_kl:
            said.append(f"mean KL {short(mean_kl)} nats, {tolerance.mean_kl:g} is allowed for {tolerance.precision}")
        if decided > tolerance.decided_flips * len(steps) and decided > 1:  # one flip among a few steps shows nothing
            said.append(f"{decided} of {len(steps)} first choices flipped where the reference had decided")
        if accuracy_decides:
            said = [f"{text} (task accuracy decides)" for text in said]
        elif said:
            verdict = "FAIL"
        elif decided:
            verdict, said = (
                "AMBIGUOUS",
                [f"{decided} of {len(steps)} first choices flipped; a dataset would tell what that costs"],
            )
    if verdict == "PASS" and near and not accuracy_decides:
        said = [*said, f"{near} first choices flipped at a near tie of the reference"]
        verdict = "AMBIGUOUS" if not tolerance.quantised else "PASS"
    return LogitsResult(
        verdict=verdict,
        distance=total,
        tolerance=tolerance.relative,
        mean_kl=mean_kl,
        mean_kl_tolerance=tolerance.mean_kl,
        max_kl=max(kl),
        agreement=1.0 - flips / len(steps),
        near_ties=near,
        decided_flips=decided,
        steps=len(steps),
        examples=list(results),
        note="; ".join(said),
    )


def compare_texts(
    answers: Iterable[Answer],
    reference: Sequence[Answer],
    expected: Sequence[Floats],
    tolerance: Tolerance,
    *,
    accuracy_decides: bool = False,
) -> list[TextResult]:
    """Free-running greedy answers. `expected`: the reference's logits along its own answer, for the margins.

    What follows the first token that differs is another text and says nothing more.
    """
    return [
        _compare_text(i, answer, other, logits, tolerance, accuracy_decides)
        for i, (answer, other, logits) in enumerate(zip(answers, reference, expected, strict=True))
    ]


def _compare_text(
    example: int, answer: Answer, reference: Answer, logits: Floats, tolerance: Tolerance, accuracy_decides: bool
) -> TextResult:
    if answer.tokens == reference.tokens:
        return TextResult(
            example=example, verdict="PASS", reference=reference.text, text=answer.text, diverged_at=None, margin=None
        )
    pairs = zip(answer.tokens, reference.tokens, strict=False)
    shorter = min(len(answer.tokens), len(reference.tokens))
    at = next((i for i, (one, other) in enumerate(pairs) if one != other), shorter)
    margin: float | None = None
    verdict: Verdict = "FAIL"
    if at < len(reference.tokens) and at < len(answer.tokens):
        row = np.asarray(logits[at], np.float64)
        margin = float(row[reference.tokens[at]] - row[answer.tokens[at]])
        near = tolerance.near_tie(largest_value(row))
        note = f"diverges at token {at}, where the reference prefers its own by {short(margin)} logits"
        if margin <= near:
            verdict, note = "AMBIGUOUS", note + ": a near tie"
        elif tolerance.quantised:
            verdict = "AMBIGUOUS"
    else:
        note = f"stops at token {shorter} where the other goes on"
    if tolerance.quantised and accuracy_decides:
        verdict, note = "PASS", note + " (task accuracy decides)"
    return TextResult(
        example=example,
        verdict=verdict,
        reference=reference.text,
        text=answer.text,
        diverged_at=at,
        margin=margin,
        note=note,
    )


def _pixels(found: Sequence[Array], expected: Sequence[Array]) -> Distance:
    """All pixels of an example in the order of its pictures; the two sides may batch them differently.

    Zeros with which one side fills a picture up, to a fixed number of patches or tiles, say nothing.
    """
    if not found and not expected:
        return Distance()
    if not found or not expected:
        return apart("pictures on one side only")
    if len(found) == len(expected):
        expected = [_in_patches(one, other) for one, other in zip(expected, found, strict=True)]
    ours, theirs = ([one.reshape(-1) for one in side] for side in (found, expected))
    if len(ours) == len(theirs):
        ends = [min(len(one), len(other)) for one, other in zip(ours, theirs, strict=True)]
        ours, theirs = ([_up_to(one, end) for one, end in zip(side, ends, strict=True)] for side in (ours, theirs))
    return distance(np.concatenate(ours), np.concatenate(theirs))


def _in_patches(picture: Array, like: Array) -> Array:
    """A picture `[…, channels, height, width]` in rows of patches, where the bundle's processor gives those (Pixtral)."""
    if like.ndim != 2 or picture.ndim < 4 or picture.size != like.size:
        return picture
    channels, height, width = picture.shape[-3:]
    side = math.isqrt(like.shape[1] // channels)
    squares = picture.reshape(channels, height // side, side, width // side, side).transpose(1, 3, 0, 2, 4)
    return squares.reshape(like.shape)


def _up_to(pixels: Array, end: int) -> Array:
    """The pixels without what is filled up with zeros beyond `end`; all of them where that is not zeros."""
    return pixels if pixels[end:].any() else pixels[:end]


def _forced(subject: Generator, example: Example, tokens: Sequence[int], reference: Floats) -> Floats:
    found = subject.forced(example, tokens)
    if len(found) != len(reference):
        raise ParityError(f"{subject.name} gave logits for {len(found)} steps of {len(reference)}.")
    return found


def _scatter(reference: Floats, found: Floats) -> list[tuple[float, float]]:
    pairs: list[tuple[float, float]] = []
    for expected, other in zip(reference, found, strict=True):
        if expected.shape != other.shape:
            continue
        count = min(SCATTER, len(expected))
        for token in np.argpartition(expected, -count)[-count:]:
            a, b = float(expected[token]), float(other[token])
            if np.isfinite(a) and np.isfinite(b):
                pairs.append((a, b))
    return pairs
