"""Compares each built graph with its portable graph on sample inputs, right after it is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.bundle.manifest import GenerativeContract, GraphEntry, GridPlaceholder
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.errors import TargetError

from .samples import Feeds, decoder_feeds, encoder_feeds, run_graph, session

FP32_TOLERANCE = 1e-4
"""fp32 graphs differ by the order of additions only: 1e-4 of the largest value."""


@dataclass(slots=True)
class Difference:
    """How far a built graph is from the portable one: largest absolute difference, the same over the largest reference

    value, and the smallest cosine of any output over all samples.
    """

    max_abs: float = 0.0
    relative: float = 0.0
    cosine: float = 1.0

    def add(self, found: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> None:
        """Takes in one pair of outputs; NaN counts as infinitely far, a different shape is an error."""
        if found.shape != wanted.shape:
            raise TargetError(f"the built graph gives shape {found.shape} where the portable one gives {wanted.shape}.")
        left, right = found.astype(np.float64).reshape(-1), wanted.astype(np.float64).reshape(-1)
        distance = np.abs(left - right).max(initial=0.0)
        if not np.isfinite(distance):
            self.max_abs, self.relative, self.cosine = float("inf"), float("inf"), -1.0
            return
        norms = float(np.linalg.norm(left) * np.linalg.norm(right))
        self.max_abs = max(self.max_abs, float(distance))
        self.relative = max(self.relative, float(distance / max(np.abs(right).max(initial=0.0), 1e-30)))
        self.cosine = min(self.cosine, float(left @ right) / norms if norms else 1.0)


def check_encoder(bundle: Bundle, role: str, built: Path, *, seed: int = 0) -> Difference:
    """A vision encoder, projector, text encoder or embedding table against its portable graph."""
    reference, graph = session(bundle.graph_path(role)), session(built)
    feeds = _encoder_inputs(bundle, role, bundle.graphs[role], seed)
    wanted, found = run_graph(reference, feeds), run_graph(graph, feeds)
    difference = Difference()
    for name, value in wanted.items():
        difference.add(found[name], value)
    return difference


def check_decoder(bundle: Bundle, built: Path) -> Difference:
    """The lowered decoder against the portable one: prefill, a chunk after a past, and one decode step.

    Compares the last token's logits and the new cache entries.
    """
    reference, graph = session(bundle.graph_path("decoder")), session(built)
    difference = Difference()
    for sequence, past in ((7, 0), (3, 9), (1, 20)):
        portable, lowered = decoder_feeds(bundle, sequence=sequence, past=past, capacity=32, seed=sequence)
        wanted, found = run_graph(reference, portable), run_graph(graph, lowered)
        for name, value in wanted.items():
            if name == "logits":
                difference.add(found[name], value[:, -1:])
            else:
                difference.add(found[name][:, :, : past + sequence], value)
    return difference


def _encoder_inputs(bundle: Bundle, role: str, entry: GraphEntry, seed: int) -> Feeds:
    """Random inputs; a projector gets what the portable vision encoder makes of them."""
    contract = bundle.manifest.contract
    merge = 1
    if isinstance(contract, GenerativeContract):
        placeholders = [one.placeholder for one in contract.modalities]
        merge = next((one.merge_size for one in placeholders if isinstance(one, GridPlaceholder)), 1)
    if role != "projector" or "vision_encoder" not in bundle.graphs:
        return encoder_feeds(entry, merge_size=merge, seed=seed)
    vision = encoder_feeds(bundle.graphs["vision_encoder"], merge_size=merge, seed=seed)
    features = run_graph(session(bundle.graph_path("vision_encoder")), vision)
    return {spec.name: features[spec.name] for spec in entry.inputs}
