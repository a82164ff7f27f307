"""Dual encoders as a whole: the vectors of pictures and texts, and which text each picture is nearest to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlm_edge_runtime.bundle.manifest import DualEncoderContract, SigmoidSimilarity, Similarity

from .metrics import compare_step, distance, worst
from .model import preprocessing_result
from .report import EmbeddingResult, PreprocessingResult, short
from .subject import Encoder, Floats
from .tolerance import Tolerance, Verdict


def compare_pixels(subject: Encoder, reference: Encoder, images: Sequence[Image.Image]) -> PreprocessingResult:
    """Preprocessing of pictures alone."""
    return preprocessing_result([distance(subject.pixels(image), reference.pixels(image)) for image in images])


def compare_vectors(what: str, found: Floats, expected: Floats, tolerance: Tolerance) -> EmbeddingResult:
    """Unit vectors [n, dim], row by row. fp32 and fp16 are judged by the largest difference, quantised by the cosine."""
    rows = [distance(one, other) for one, other in zip(found, expected, strict=True)]
    total = worst(rows)
    said = total.note
    if not said:
        if tolerance.relative is not None and not total.within(tolerance.relative):
            said = f"vectors differ by {short(total.relative)} of the largest component, {tolerance.relative:g} is allowed"
        elif tolerance.relative is None and total.cosine < tolerance.cosine:
            said = f"cosine {total.cosine:.4f} to the original, {tolerance.cosine:g} is asked of {tolerance.precision}"
    return EmbeddingResult(
        what=what,
        verdict="FAIL" if said else "PASS",
        distance=total,
        tolerance=tolerance.cosine if tolerance.relative is None else tolerance.relative,
        rows=len(rows),
        note=said,
    )


def compare_similarities(
    found: tuple[Floats, Floats],
    expected: tuple[Floats, Floats],
    contract: DualEncoderContract,
    tolerance: Tolerance,
    *,
    accuracy_decides: bool = False,
) -> EmbeddingResult:
    """The model's own scores of every picture with every text, and whether each picture's nearest text is the same."""
    ours, theirs = scores(*found, contract.similarity), scores(*expected, contract.similarity)
    total = worst([distance(ours, theirs)])
    # Cosines of unit vectors differ by at most the vectors' difference, and are multiplied by the scale.
    allowed = (tolerance.relative or 0.0) * contract.similarity.logit_scale
    near = 2.0 * allowed if tolerance.relative is not None else tolerance.near_tie(0.0)
    steps = [compare_step(expected_row, row, near) for row, expected_row in zip(ours, theirs, strict=True)]
    near_ties = sum(step.near_tie for step in steps)
    decided = sum(step.flipped for step in steps) - near_ties
    verdict: Verdict = "PASS"
    said = total.note
    if said:
        verdict = "FAIL"
    elif tolerance.relative is not None and total.max_abs > allowed:
        verdict, said = "FAIL", f"scores differ by {short(total.max_abs)}, {short(allowed)} is allowed"
    elif decided:
        verdict = "FAIL" if tolerance.relative is not None else "AMBIGUOUS"
        said = f"{decided} of {len(steps)} pictures have another nearest text"
    elif near_ties:
        verdict, said = "AMBIGUOUS", f"{near_ties} of {len(steps)} pictures have another nearest text, at a near tie"
    if accuracy_decides and verdict == "AMBIGUOUS":
        verdict, said = "PASS", f"{said} (task accuracy decides)"
    pairs = [(float(a), float(b)) for a, b in zip(theirs.ravel(), ours.ravel(), strict=True) if np.isfinite(a) and np.isfinite(b)]
    return EmbeddingResult(
        what="similarity",
        verdict=verdict,
        distance=total,
        tolerance=allowed,
        near_ties=near_ties,
        decided_flips=decided,
        rows=len(steps),
        scatter=pairs[:2000],
        note=said,
    )


def scores(images: Floats, texts: Floats, similarity: Similarity) -> Floats:
    """logit_scale · image · textᵀ (+ logit_bias), [images, texts], of unit vectors."""
    found = similarity.logit_scale * (images.astype(np.float64) @ texts.astype(np.float64).T)
    if isinstance(similarity, SigmoidSimilarity):
        found = found + similarity.logit_bias
    result: Floats = found.astype(np.float32)
    return result
