"""Compares each built graph with its portable graph on sample inputs, right after it is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.errors import TargetError

from .samples import PAST, Feeds, Samples, run_graph, session
from .steps import STEPS, is_shared, is_static, laid_beside, shared_feeds, split_inputs, static_cache_feeds

FP32_TOLERANCE = 1e-4
"""fp32 graphs differ by the order of additions only: 1e-4 of the largest value."""
_MASKED = 1e30
"""Equal values beyond this are fillers of masks; they say nothing about the size of the other values."""
_SPARE = 11
"""Slots of the buffer beyond what a step fills."""


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
        filler = (left == right) & (np.abs(right) >= _MASKED)
        left, right = np.where(filler, 0.0, left), np.where(filler, 0.0, right)
        distance = np.abs(left - right).max(initial=0.0)
        if not np.isfinite(distance):
            self.max_abs, self.relative, self.cosine = float("inf"), float("inf"), -1.0
            return
        norms = float(np.linalg.norm(left) * np.linalg.norm(right))
        self.max_abs = max(self.max_abs, float(distance))
        self.relative = max(self.relative, float(distance / max(np.abs(right).max(initial=0.0), 1e-30)))
        self.cosine = min(self.cosine, float(left @ right) / norms if norms else 1.0)


def check_encoder(bundle: Bundle, role: str, built: Path, samples: Samples, *, seed: int = 0) -> Difference:
    """Any graph but the decoder against its portable one."""
    feeds = samples.inputs(role, seed=seed)
    wanted, found = run_graph(session(bundle.graph_path(role)), feeds), run_graph(session(built), feeds)
    difference = Difference()
    for name, value in wanted.items():
        difference.add(found[name], value)
    return difference


def _token_by_token(bundle: Bundle, graph: ort.InferenceSession, feeds: Feeds) -> Feeds:
    """The last call's outputs of a recurrent decoder that takes one token a call."""
    by_token, _ = split_inputs(bundle.graphs["decoder"].inputs)
    outputs: Feeds = {}
    for token in range(feeds["inputs_embeds"].shape[1]):
        one = {name: array[:, token : token + 1] if name in by_token else array for name, array in feeds.items()}
        states = {name.removeprefix("present_"): array for name, array in outputs.items() if name.startswith("present_state.")}
        outputs = run_graph(graph, one | states)
    return outputs


def check_decoder(bundle: Bundle, built: Path, samples: Samples) -> Difference:
    """The lowered decoder against the portable one: prefill, a chunk after a past, decode of one row and of several.

    Compares the last token's logits, the new cache entries and whatever else both give.
    """
    reference, graph = session(bundle.graph_path("decoder")), session(built)
    inputs = {value.name: value.shape for value in graph.get_inputs()}
    capacity = next((shape[2] for name, shape in inputs.items() if name.startswith(PAST)), 0)
    if is_static(list(inputs)) and capacity < min(past + sequence for _, sequence, past, _ in STEPS):
        raise TargetError(f"{built}: a cache of {capacity} entries is too small to be compared with the portable decoder.")
    difference = Difference()
    for rows, sequence, past, padding in STEPS:
        if is_static(list(inputs)) and past + sequence > capacity:
            continue
        portable = samples.decoder(sequence=sequence, past=past, rows=rows, padding=padding, seed=sequence)
        wanted = run_graph(reference, portable)
        feeds = portable
        if is_static(list(inputs)):
            feeds = static_cache_feeds(portable, capacity=capacity)
        elif is_shared(list(inputs)):
            feeds = shared_feeds(portable, capacity=past + sequence + _SPARE)
        found = _token_by_token(bundle, graph, feeds) if inputs["inputs_embeds"][1] == 1 else run_graph(graph, feeds)
        for _, got, expected in laid_beside(found, wanted, portable):
            difference.add(got, expected)
    return difference
