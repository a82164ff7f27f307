"""Each graph by itself, against what the reference gives for the same inputs.

A lowered decoder has another signature than the portable one (a shared KV buffer, no mask, the last token's logits): each
row of a case is given to it alone, without its padding, and the outputs are laid beside the right part of the portable's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from vlm_edge.targets.samples import decoder_feeds, encoder_feeds
from vlm_edge_runtime.bundle.manifest import GenerativeContract, GraphEntry, GridPlaceholder
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.errors import ParityError

from .metrics import Distance, apart, distance
from .report import CaseResult, GraphResult, graph_result
from .subject import Array, GraphCase, GraphReference
from .tolerance import tolerance

PORTABLE_NAME = "portable graphs"


class PortableReference:
    """The portable graphs as the reference: what a device has when there is no PyTorch."""

    def __init__(self, bundle: Bundle) -> None:
        self.name = PORTABLE_NAME
        self._bundle = bundle

    def graph_cases(self, role: str) -> Iterator[GraphCase]:
        """Random inputs in the scale of the real ones; the decoder at prefill, continued prefill and decode."""
        graph = open_session(self._bundle.graph_path(role), role)
        for label, feeds in _inputs(self._bundle, role):
            yield GraphCase(label, feeds, run(graph, feeds, role))


def compare_graph(bundle: Bundle, role: str, reference: GraphReference) -> GraphResult:
    """Compares one graph of an opened bundle (portable or a build) on every case of the reference."""
    entry = bundle.graphs[role]
    graph = open_session(bundle.graph_path(role), role)
    results: list[CaseResult] = []
    for case in reference.graph_cases(role):
        results += [CaseResult(case=case.label, output=name, distance=found) for name, found in compare_case(graph, entry, case)]
    return graph_result(role, entry.precision, tolerance(entry.precision).relative, results)


def compare_case(graph: ort.InferenceSession, entry: GraphEntry, case: GraphCase) -> Iterator[tuple[str, Distance]]:
    """Every output of one case: (name, distance). A graph that refuses the inputs is infinitely far, and says why."""
    try:
        if is_lowered(entry):
            yield from _compare_rows(graph, case, entry.role)
            return
        found = run(graph, case.feeds, entry.role)
    except ParityError as error:
        yield next(iter(case.expected)), apart(str(error))
        return
    for name, expected in case.expected.items():
        yield name, distance(found[name], expected, case.masks.get(name)) if name in found else apart("the output is missing")


def is_lowered(entry: GraphEntry) -> bool:
    """Whether this is a decoder with a shared KV buffer."""
    return any(spec.name == "seqlens_k" for spec in entry.inputs)


def lower_row(case: GraphCase, row: int) -> tuple[dict[str, Array], int, int]:
    """One row of a portable decoder case as the lowered decoder takes it: (feeds, padded entries, new tokens)."""
    mask = case.feeds["attention_mask"][row].astype(bool)
    total, padding = len(mask), int((~mask).sum())
    sequence = case.feeds["inputs_embeds"].shape[1]
    new = min(sequence, total - padding)
    past = total - sequence
    feeds: dict[str, Array] = {
        "inputs_embeds": case.feeds["inputs_embeds"][row : row + 1, sequence - new :],
        "position_ids": case.feeds["position_ids"][..., row : row + 1, sequence - new :],
        "seqlens_k": np.array([total - padding - 1], np.int32),
        "total_sequence_length": np.array([total - padding], np.int32),
    }
    for name, cache in case.feeds.items():
        if name.startswith("past_key_values."):
            _, heads, _, size = cache.shape
            buffer = np.zeros((1, heads, total + 8, size), cache.dtype)
            kept = cache[row, :, min(padding, past) :]
            buffer[0, :, : kept.shape[1]] = kept
            feeds[name] = buffer
    return feeds, padding, new


def _compare_rows(graph: ort.InferenceSession, case: GraphCase, role: str) -> Iterator[tuple[str, Distance]]:
    for row in range(len(case.feeds["inputs_embeds"])):
        feeds, padding, _ = lower_row(case, row)
        found = run(graph, feeds, role)
        for name, expected in case.expected.items():
            if name not in found:
                yield name, apart("the output is missing")
            elif name == "logits":
                yield name, distance(found[name][0, -1:], expected[row, -1:])
            else:
                wanted = expected[row, :, padding:]
                yield name, distance(found[name][0, :, : wanted.shape[1]], wanted)


def open_session(path: Path, role: str) -> ort.InferenceSession:
    """A CPU session. Raises ParityError when ONNX Runtime cannot load the graph."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base of their own
        raise ParityError(f"ONNX Runtime cannot load {role} ({path}): {_line(error)}") from error


def run(graph: ort.InferenceSession, feeds: dict[str, Array], role: str) -> dict[str, Array]:
    """All outputs by name. Raises ParityError when an input is missing or ONNX Runtime refuses."""
    wanted = [value.name for value in graph.get_inputs()]
    missing = [name for name in wanted if name not in feeds]
    if missing:
        raise ParityError(f"{role} wants {', '.join(missing)}, which this comparison has no values for.")
    names = [value.name for value in graph.get_outputs()]
    try:
        return dict(zip(names, graph.run(names, {name: feeds[name] for name in wanted}), strict=True))
    except Exception as error:
        raise ParityError(f"{role} failed in ONNX Runtime: {_line(error)}") from error


def _inputs(bundle: Bundle, role: str) -> Iterator[tuple[str, dict[str, Array]]]:
    if role == "decoder":
        for label, sequence, past in (("prefill of 7", 7, 0), ("3 after 9", 3, 9), ("decode after 20", 1, 20)):
            yield label, decoder_feeds(bundle, sequence=sequence, past=past, capacity=past + sequence, seed=sequence)[0]
        return
    contract = bundle.manifest.contract
    merge = 1
    if isinstance(contract, GenerativeContract):
        placeholders = [one.placeholder for one in contract.modalities]
        merge = next((one.merge_size for one in placeholders if isinstance(one, GridPlaceholder)), 1)
    for seed in range(2):
        if role == "projector" and "vision_encoder" in bundle.graphs:
            vision = encoder_feeds(bundle.graphs["vision_encoder"], merge_size=merge, seed=seed)
            features = run(open_session(bundle.graph_path("vision_encoder"), "vision_encoder"), vision, "vision_encoder")
            yield f"features of random pictures {seed}", {spec.name: features[spec.name] for spec in bundle.graphs[role].inputs}
        else:
            yield f"random inputs {seed}", encoder_feeds(bundle.graphs[role], merge_size=merge, seed=seed)


def _line(error: Any) -> str:
    return " ".join(str(error).split())[:300]
