"""How far apart two results are: tensors, next-token distributions, choices.

Nothing that cannot be compared is ever dropped: a NaN, an infinity on one side only, or another shape counts as UNBOUNDED.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

UNBOUNDED = sys.float_info.max
"""Stands for "infinitely far". JSON, and so the manifest, has no infinity; every tolerance is below this number."""

_MASKED = 1e30
"""Equal values beyond this are fillers of attention masks; they say nothing about the size of the other values."""

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


class Distance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Two tensors compared.

    - `max_abs`: max |a − b|;
    - `relative`: max |a − b| / max |b|, b being the reference: the error in units of the largest value there is;
    - `cosine`: a·b / (‖a‖ ‖b‖) of the two as vectors;
    - `note`: why they could not be compared, or empty.
    """

    max_abs: float = 0.0
    relative: float = 0.0
    cosine: float = 1.0
    note: str = ""

    def within(self, tolerance: float) -> bool:
        """Whether the relative difference is at most `tolerance`. Never true for what could not be compared."""
        return not self.note and self.relative <= tolerance


def apart(note: str) -> Distance:
    """The distance of two things that cannot be compared."""
    return Distance(max_abs=UNBOUNDED, relative=UNBOUNDED, cosine=-1.0, note=note)


def distance(found: npt.ArrayLike, expected: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> Distance:
    """Compares `found` with the reference `expected` (any shape, equal on both sides) where `mask` (broadcastable) is true."""
    a, b = np.asarray(found), np.asarray(expected)
    if a.shape != b.shape:
        return apart(f"shape {list(a.shape)} instead of {list(b.shape)}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    if mask is not None:
        chosen = np.broadcast_to(np.asarray(mask, bool), a.shape)
        a, b = a[chosen], b[chosen]
    if a.size == 0:
        return Distance()
    same = a == b
    bad = ~(np.isfinite(a) & np.isfinite(b)) & ~same  # equal infinities are equal; NaN never is
    if bad.any():
        return apart(f"{int(bad.sum())} of {a.size} values are NaN or infinite on one side")
    filler = same & (np.abs(b) >= _MASKED)
    a, b = np.where(filler, 0.0, a), np.where(filler, 0.0, b)
    largest, size = float(np.abs(a - b).max()), float(np.abs(b).max())
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = min(1.0, max(-1.0, float(np.vdot(a, b)) / norms)) if norms else float(largest == 0.0)
    relative = largest / size if size else (0.0 if largest == 0.0 else UNBOUNDED)
    return Distance(max_abs=largest, relative=min(relative, UNBOUNDED), cosine=cosine)


def largest_value(values: npt.ArrayLike) -> float:
    """max |values|, leaving out infinities and fillers of masks; 0 where nothing is left."""
    sizes = np.abs(np.asarray(values, np.float64))
    return float(sizes[sizes < _MASKED].max(initial=0.0))


def worst(distances: Iterable[Distance]) -> Distance:
    """The largest of each number and the first note."""
    each = list(distances)
    if not each:
        return Distance()
    return Distance(
        max_abs=max(one.max_abs for one in each),
        relative=max(one.relative for one in each),
        cosine=min(one.cosine for one in each),
        note=next((one.note for one in each if one.note), ""),
    )


def log_softmax(logits: npt.ArrayLike) -> Floats:
    """Log probabilities in nats along the last axis. −inf logits are impossible tokens and stay −inf."""
    x = np.asarray(logits, np.float64)
    shifted = x - x.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def kl_divergence(reference: npt.ArrayLike, found: npt.ArrayLike) -> Floats:
    """KL(reference ‖ found) in nats per row of logits [..., vocabulary] → [...]. UNBOUNDED where it is not a finite number.

    Kullback & Leibler 1951; the measure by which quantised language models are commonly compared with their originals.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        p, q = log_softmax(reference), log_softmax(found)
        terms = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q))
        value = terms.sum(axis=-1)
    result: Floats = np.where(np.isfinite(value), np.maximum(value, 0.0), UNBOUNDED)
    return result


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One teacher-forced step: what both would say next.

    `margin`: the reference's first choice over its second, in logits. `flipped`: the first choices differ. `near_tie`: they
    differ and the margin is so small that the reference itself hardly decides (see tolerance.py).
    """

    reference_token: int
    token: int
    kl: float
    margin: float
    distance: Distance
    flipped: bool
    near_tie: bool


def compare_step(reference: npt.ArrayLike, found: npt.ArrayLike, near: float) -> Step:
    """Compares two rows of logits [vocabulary]; `near` is the margin (in logits) up to which a flip is a near tie."""
    expected, other = np.asarray(reference, np.float64), np.asarray(found, np.float64)
    apart_by = distance(other, expected)
    first, margin = first_choice(expected)
    if apart_by.note:
        return Step(reference_token=first, token=-1, kl=UNBOUNDED, margin=margin, distance=apart_by, flipped=True, near_tie=False)
    choice = first_choice(other)[0]
    flipped = choice != first
    # The tie must be between these two: a jump to the tenth choice is none, however close the second was.
    gap = float(expected[first] - expected[choice])
    return Step(
        reference_token=first,
        token=choice,
        kl=float(kl_divergence(expected, other)),
        margin=margin,
        distance=apart_by,
        flipped=flipped,
        near_tie=flipped and gap <= near,
    )


def first_choice(logits: npt.ArrayLike) -> tuple[int, float]:
    """The most likely token of logits [vocabulary] and by how much it leads the second."""
    row = np.asarray(logits, np.float64)
    if row.size < 2:
        return 0, UNBOUNDED
    second, first = np.argpartition(row, -2)[-2:]
    if row[second] > row[first]:
        first, second = second, first
    if row[first] == row[second]:  # as argmax does: the lower index
        first = int(np.argmax(row))
        return first, 0.0
    margin = float(row[first] - row[second])
    return int(first), margin if np.isfinite(margin) else UNBOUNDED
