"""What is allowed, and why. No number here was chosen because something happened to pass.

**Computed the same way** (fp32, fp16): the difference of an output is max |a − b| / max |b|. fp32 holds 24 bits (6e-8 a
rounding); another order of summation costs some tens to hundreds of roundings, so 1e-4 is met with room by an equal graph
and missed by a wrong one. fp16 holds 11 bits (5e-4 a rounding): 1e-2 likewise.

**Quantised** (int8, int8w, int4): a single number may be off by much while the answer is right, so graphs are reported and
only refused when something is not finite or has another shape. The whole model decides:

- with a dataset, by task accuracy: a loss above `accuracy_points` (1 point) is FAIL. Where one answer is worth more than
  that (fewer than 100 questions) a single lost answer is AMBIGUOUS;
- without one, by the mean KL divergence of the next-token distributions along the reference's own answer, and by how often
  the first choice flips where the reference had decided. By Pinsker's inequality the probability mass that moves is at most
  √(KL/2): 0.01 nats (int8) is at most 7 %, 0.1 nats (int4) at most 22 %. Published measurements of good 8-bit weights are
  about 0.001-0.005 nats and of good 4-bit weights 0.02-0.06 (llama.cpp's perplexity tool), of broken ones above 1.

**Near ties.** A flipped first choice is AMBIGUOUS, not FAIL, where the reference itself hardly decides. That cannot be judged
by the error observed at the step: an error *must* be at least half the margin to flip a choice, so every flip would excuse
itself. It is judged by what is allowed: for fp32 and fp16 a margin up to twice the tolerance (two logits may move towards each
other); for quantised graphs odds below 1.5 : 1, that is a margin below ln 1.5.

**Embeddings** (dual encoders), quantised: turning a unit vector so that its cosine to the original is c moves a similarity by
at most √(2(1 − c)). int8 must keep 0.99 (0.14), int4 0.96 (0.28).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import msgspec

Verdict = Literal["PASS", "AMBIGUOUS", "FAIL"]
_RANK: dict[str, int] = {"PASS": 0, "AMBIGUOUS": 1, "FAIL": 2}
EXIT_CODES: dict[str, int] = {"PASS": 0, "FAIL": 1, "AMBIGUOUS": 2}
"""The exit code of `vlm-edge parity`. Errors (nothing could be compared) have codes of their own, above these."""

PREPROCESSING = 1e-6
"""Preprocessing does integer resampling and then two float32 operations per value: a few 1e-7 of the largest value."""

NEAR_TIE_ODDS = 1.5
ACCURACY_POINTS = 1.0


class Tolerance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one precision may differ by; see the module. `relative` None: quantised, numbers alone decide nothing.

    `bisect`: from which relative difference on an intermediate value counts as wrong. For quantised graphs it is several times
    the error that the weights' format brings by itself (4-bit blocks: about 10 % of a product, 8-bit: below 1 %).
    """

    precision: str
    relative: float | None
    mean_kl: float
    decided_flips: float
    cosine: float
    bisect: float

    @property
    def quantised(self) -> bool:
        """Whether this precision is judged by what the whole model answers."""
        return self.relative is None

    def near_tie(self, largest_logit: float) -> float:
        """The margin, in logits, up to which a flipped choice is a near tie; `largest_logit`: max |logits| of the reference."""
        if self.relative is None:
            return math.log(NEAR_TIE_ODDS)
        return 2.0 * self.relative * largest_logit


_TOLERANCES = {
    "fp32": Tolerance(precision="fp32", relative=1e-4, mean_kl=1e-4, decided_flips=0.0, cosine=1 - 1e-6, bisect=1e-4),
    "fp16": Tolerance(precision="fp16", relative=1e-2, mean_kl=1e-3, decided_flips=0.0, cosine=1 - 1e-4, bisect=1e-2),
    "int8": Tolerance(precision="int8", relative=None, mean_kl=0.01, decided_flips=0.02, cosine=0.99, bisect=0.1),
    "int4": Tolerance(precision="int4", relative=None, mean_kl=0.1, decided_flips=0.05, cosine=0.96, bisect=0.5),
}
_ALIASES = {"int8w": "int8"}
_ORDER = ("fp32", "fp16", "int8", "int4")


def tolerance(precision: str) -> Tolerance:
    """The tolerance of a precision as the manifest names it. An unknown one is judged as fp32, the strictest."""
    return _TOLERANCES.get(_ALIASES.get(precision, precision), _TOLERANCES["fp32"])


def loosest(precisions: Iterable[str]) -> Tolerance:
    """The tolerance of a whole model: that of its coarsest graph."""
    known = [tolerance(precision).precision for precision in precisions] or ["fp32"]
    return _TOLERANCES[max(known, key=_ORDER.index)]


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of several verdicts; PASS for none."""
    return max(verdicts, key=_RANK.__getitem__, default="PASS")
