"""Each graph by itself, against what the reference gives for the same inputs.

A lowered decoder has another signature than the portable one (a shared KV buffer, no mask, the last token's logits): each
row of a case is given to it alone, without its padding, and the outputs are laid beside the right part of the portable's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from vlm_edge.targets.precision import kind_of
from vlm_edge.targets.samples import Samples
from vlm_edge.targets.steps import STEPS, is_shared, laid_beside, padding_of, row_of, shared_feeds, split_inputs
from vlm_edge_runtime.bundle.manifest import GraphEntry
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.errors import ParityError

from .metrics import Distance, apart, distance
from .report import CaseResult, GraphResult, graph_result
from .subject import Array, GraphCase, GraphReference
from .tolerance import tolerance

PORTABLE_NAME = "portable graphs"
_SPARE = 8
"""Slots of a lowered decoder's buffer beyond what a case fills."""


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
            yield from _compare_rows(graph, entry, case)
            return
        found = run(graph, case.feeds, entry.role)
    except ParityError as error:
        yield next(iter(case.expected)), apart(str(error))
        return
    for name, expected in case.expected.items():
        if name not in found:
            yield name, apart("the output is missing")
        elif name == "logits" and found[name].shape[1] == 1 < expected.shape[1]:  # a build computes the last token's only
            yield name, distance(found[name], expected[:, -1:])
        else:
            yield name, distance(found[name], expected, case.masks.get(name))


def is_lowered(entry: GraphEntry) -> bool:
    """Whether this is a decoder with a shared KV buffer."""
    return is_shared([spec.name for spec in entry.inputs])


def lower_row(case: GraphCase, row: int, entry: GraphEntry) -> dict[str, Array]:
    """One row of a portable decoder case as the lowered decoder `entry` takes it."""
    alone = _alone(case, row, entry)
    return shared_feeds(alone, capacity=alone["attention_mask"].shape[1] + _SPARE)


def single_step(cases: Sequence[GraphCase]) -> GraphCase:
    """The case of one new token in one row: the one whose inner values have the same shapes in both signatures."""
    return next((one for one in cases if one.feeds["inputs_embeds"].shape[:2] == (1, 1)), cases[-1])


def _alone(case: GraphCase, row: int, entry: GraphEntry) -> dict[str, Array]:
    tokens, rows = split_inputs(entry.inputs)
    return row_of(case.feeds, row, sequence_inputs=tokens, rows_inputs=rows)


def _compare_rows(graph: ort.InferenceSession, entry: GraphEntry, case: GraphCase) -> Iterator[tuple[str, Distance]]:
    for row, skipped in enumerate(padding_of(case.feeds)):
        found = run(graph, lower_row(case, row, entry), entry.role)
        past = case.feeds["attention_mask"].shape[1] - case.feeds["inputs_embeds"].shape[1]
        per_token, _ = split_inputs(entry.outputs)
        wanted = {
            name: array[row : row + 1, :, skipped:]
            if name.startswith("present.")
            else array[row : row + 1, max(skipped - past, 0) if name in per_token else 0 :]
            for name, array in case.expected.items()
        }
        yield from ((name, apart("the output is missing")) for name in wanted if name not in found)
        for name, got, expected in laid_beside(found, wanted, _alone(case, row, entry)):
            yield name, distance(got, expected)


def open_session(path: Path, role: str) -> ort.InferenceSession:
    """A CPU session, or one of a decoder's plan. Raises ParityError when the graph cannot be loaded."""
    if path.suffix == ".plan":
        from vlm_edge.targets.native.session import PlanSession

        return PlanSession(path)  # what is used of a session, it has
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
    samples = Samples(bundle)
    if kind_of(role) == "decoder":
        for rows, sequence, past, padding in STEPS:
            label = f"{sequence} after {past}" + (f", {rows} rows, {padding} padded" if rows > 1 else "")
            yield label, samples.decoder(sequence=sequence, past=past, rows=rows, padding=padding, seed=sequence)
        return
    for seed in range(2):
        yield f"random inputs {seed}", samples.inputs(role, seed=seed)


def _line(error: Any) -> str:
    return " ".join(str(error).split())[:300]
