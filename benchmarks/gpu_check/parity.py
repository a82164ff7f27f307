"""Whether a build answers on the GPU as its portable graphs do on this machine's CPU. No PyTorch in here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlm_edge_runtime import DualEncoder, VisionLanguageModel

from .measure import opened

TOLERANCE = 1e-2
"""Half precision: largest difference of logits or embeddings over the largest reference value."""
MISSED = 2
"""Answers that a build with 4-bit weights may lose."""
NEW_TOKENS = 24


def check(bundle: str, build: str, place: str, examples: str, exact: bool) -> dict[str, Any]:
    """Compares one build with the portable graphs on held-out examples.

    `exact`: fp16, judged by TOLERANCE along the reference's own answers; else by the answers that are lost. `place`: "auto"
    (the build's own device) or "cpu" (the CUDA loop on the CPU provider).
    """
    rows = json.loads((Path(examples) / "examples.json").read_text())
    pictures = [Image.open(Path(examples) / row["image"]).convert("RGB") for row in rows]
    with opened(Path(bundle), "portable", "auto") as reference, opened(Path(bundle), build, place) as session:
        if isinstance(reference, DualEncoder):
            assert isinstance(session, DualEncoder)
            found = _embeddings(reference, session, pictures, [row["answer"] for row in rows])
        else:
            assert isinstance(reference, VisionLanguageModel) and isinstance(session, VisionLanguageModel)
            found = _answers(reference, session, pictures, rows)
    lost = found["reference_right"] - found["right"]
    good = found["relative"] <= TOLERANCE if exact else lost <= MISSED
    return {"verdict": "PASS" if good else "FAIL", "examples": len(rows), "lost": lost, **found}


def _answers(
    reference: VisionLanguageModel, session: VisionLanguageModel, pictures: Sequence[Image.Image], rows: Sequence[dict[str, str]]
) -> dict[str, Any]:
    right, base, same, worst, cosine = 0, 0, 0, 0.0, 1.0
    for picture, row in zip(pictures, rows, strict=True):
        ask: dict[str, Any] = {"images": [picture], "temperature": 0.0, "max_new_tokens": NEW_TOKENS}
        wanted, got = reference.generate(row["prompt"], **ask), session.generate(row["prompt"], **ask)
        base += wanted.text.strip() == row["answer"]
        right += got.text.strip() == row["answer"]
        same += got.tokens == wanted.tokens
        logits = [one.logits_along(row["prompt"], [picture], wanted.tokens) for one in (reference, session)]
        difference = _distance(*logits)
        worst, cosine = max(worst, difference[0]), min(cosine, difference[1])
    return {"reference_right": base, "right": right, "same_answer": same, "relative": worst, "cosine": cosine}


def _embeddings(
    reference: DualEncoder, session: DualEncoder, pictures: Sequence[Image.Image], texts: Sequence[str]
) -> dict[str, Any]:
    found = [[one.embed_image(list(pictures)), one.embed_text(list(texts))] for one in (reference, session)]
    pairs = [_distance(wanted, got) for wanted, got in zip(*found, strict=True)]
    own = np.arange(len(texts))
    hits = [int(((images @ words.T).argmax(1) == own).sum()) for images, words in found]
    return {
        "reference_right": hits[0],
        "right": hits[1],
        "relative": max(pair[0] for pair in pairs),
        "cosine": min(pair[1] for pair in pairs),
    }


def _distance(wanted: npt.NDArray[np.float32], got: npt.NDArray[np.float32]) -> tuple[float, float]:
    """(largest difference over the largest reference value, cosine); NaN is infinitely far."""
    left, right = wanted.astype(np.float64).reshape(-1), got.astype(np.float64).reshape(-1)
    relative = float(np.abs(left - right).max() / np.abs(left).max())
    if not np.isfinite(relative):
        return float("inf"), -1.0
    return relative, float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))
