"""What a half-precision graph computes, on a machine without a GPU; and which islands it needs, decided by that."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from .dtypes import inner_graphs
from .graph import insert, like
from .islands import Half, Islands
from .strong_types import HALVES, TYPED, StrongTypes

Feeds = Mapping[str, npt.NDArray[Any]]
Outputs = dict[str, npt.NDArray[Any]]
_FLOAT = ir.DataType.FLOAT


def half_twin(model: ir.Model) -> ir.Model:
    """A strongly typed graph → an fp32 graph that rounds to half after every node; inputs and outputs are fp32.

    ONNX Runtime's CPU provider runs most operators on half tensors in fp32 and does not round in between, so that running
    the typed graph itself hides overflow and rounding. Here each half result goes through half and back, explicitly: products
    are summed in fp32 and rounded once, as tensor cores do. Raises ValueError for a graph that is not typed.
    """
    if TYPED not in model.metadata_props:
        raise ValueError("the graph is not strongly typed")
    twin = model.clone()
    half = HALVES[twin.metadata_props[TYPED]][0]  # type: ignore[index]
    graph = twin.graph
    back: dict[ir.Value, ir.Value] = {}
    nodes = list(graph)
    for value in graph.initializers.values():
        if value.dtype == half and value.uses():
            back[value] = _widened(nodes[0], value)
    for given in graph.inputs:
        if given.dtype == half and nodes:
            given.type = ir.TensorType(_FLOAT)
            rounded = insert(nodes[0], "Cast", [given], {"to": int(half)}).outputs[0]
            like(rounded, given).type = ir.TensorType(half)
            rounded.name = f"{given.name}.rounded"
            back[given] = _widened(nodes[0], rounded)
    _round_nodes(graph, nodes, half, back)
    return twin


def _round_nodes(graph: ir.Graph, nodes: list[ir.Node], half: ir.DataType, back: dict[ir.Value, ir.Value]) -> None:
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is not None and value in back:
                node.replace_input_with(index, back[value])
        for branch in inner_graphs(node):
            _round_nodes(branch, list(branch), half, back)
        for out in node.outputs:
            if out.dtype == half and (out.uses() or out.is_graph_output()):
                back[out] = _rounded(graph, node, out, half)
        _widen_attributes(node, half)


def _widened(before: ir.Node, value: ir.Value) -> ir.Value:
    wide = insert(before, "Cast", [value], {"to": int(_FLOAT)}).outputs[0]
    like(wide, value).type = ir.TensorType(_FLOAT)
    wide.name = f"{value.name}.wide"  # names are shared with subgraphs: a numbered one may be taken there
    return wide


def _rounded(graph: ir.Graph, node: ir.Node, out: ir.Value, half: ir.DataType) -> ir.Value:
    """out → half → fp32, behind the node; a graph output keeps its name."""
    down = ir.node("Cast", [out], {"to": int(half)})
    up = ir.node("Cast", [down.outputs[0]], {"to": int(_FLOAT)})
    graph.insert_after(node, [down, up])
    out.type = ir.TensorType(_FLOAT)
    wide = up.outputs[0]
    like(wide, out)
    down.outputs[0].type = ir.TensorType(half)
    down.outputs[0].name, wide.name = f"{out.name}.rounded", f"{out.name}.wide"
    for index, value in enumerate(graph.outputs):
        if value is out:
            out.name, wide.name = f"{out.name}.exact", out.name
            graph.outputs[index] = wide
    return wide


def _widen_attributes(node: ir.Node, half: ir.DataType) -> None:
    if node.op_type == "Cast" and not node.domain and node.attributes["to"].as_int() == int(half):
        node.attributes["to"] = ir.AttrInt64("to", int(_FLOAT))


def run_model(model: ir.Model, feeds: Sequence[Feeds]) -> list[Outputs]:
    """Runs a graph as it is written, through a temporary folder (weights may be larger than a message)."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory(prefix="vlm-edge-half-") as folder:
        path = Path(folder) / "graph.onnx"
        ir.save(model.clone(), path, external_data="graph.onnx.data")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        taken = {value.name for value in session.get_inputs()}
        return [dict(zip(names, session.run(names, {name: given[name] for name in taken}), strict=True)) for given in feeds]


@dataclass(slots=True, frozen=True)
class IslandTrial:
    """One choice of islands and how far its graph is from the fp32 one: smallest cosine, largest relative difference."""

    islands: Islands
    cosine: float
    relative: float


TRIALS = (
    Islands(norms=False, softmax=False),
    Islands(norms=False, softmax=True),
    Islands(norms=True, softmax=False),
    Islands(norms=True, softmax=True),
)
"""From the fastest to the most careful."""


def choose_islands(
    load: Callable[[], ir.Model],
    feeds: Sequence[Feeds],
    *,
    half: Half = "fp16",
    tolerance: float = 1e-2,
    trials: Sequence[Islands] = TRIALS,
) -> tuple[Islands, list[IslandTrial]]:
    """The first of `trials` whose half graph stays within `tolerance` of the fp32 graph on `feeds`; and all that were tried.

    `load` gives the fp32 graph afresh, `feeds` are its inputs. The measure is the largest difference of any output over that
    output's largest value; a result with NaN or infinity is infinitely far. Where none is good enough the nodes whose results
    fp16 cannot hold are added to the last trial; if that is not enough either, the nearest trial is returned, and the caller
    sees by its distance what it gets.
    """
    wanted = run_model(load(), feeds)
    tried: list[IslandTrial] = []
    for islands in trials:
        tried.append(_trial(load, feeds, wanted, half, islands))
        if tried[-1].relative <= tolerance:
            return islands, tried
    nodes = overflowing_nodes(load(), feeds, half)
    if nodes:
        islands = Islands(trials[-1].norms, trials[-1].softmax, trials[-1].nodes | nodes)
        tried.append(_trial(load, feeds, wanted, half, islands))
    return min(tried, key=lambda one: one.relative).islands, tried


def _trial(
    load: Callable[[], ir.Model], feeds: Sequence[Feeds], wanted: Sequence[Outputs], half: Half, islands: Islands
) -> IslandTrial:
    model = load()
    StrongTypes(half, islands).apply(model)
    return IslandTrial(islands, *farthest(run_model(half_twin(model), feeds), wanted))


def farthest(found: Sequence[Outputs], wanted: Sequence[Outputs]) -> tuple[float, float]:
    """(smallest cosine, largest difference over the largest value) over all float outputs of several runs."""
    pairs = [
        _distance(one[name], right)
        for one, expected in zip(found, wanted, strict=True)
        for name, right in expected.items()
        if np.issubdtype(right.dtype, np.floating)
    ]
    return min((cosine for cosine, _ in pairs), default=1.0), max((relative for _, relative in pairs), default=0.0)


def _distance(found: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> tuple[float, float]:
    """(cosine, largest difference over the largest value) of two arrays; (−1, inf) when the first is not finite."""
    left, right = found.astype(np.float64).reshape(-1), wanted.astype(np.float64).reshape(-1)
    if not np.isfinite(left).all():
        return -1.0, float("inf")
    norms = float(np.linalg.norm(left) * np.linalg.norm(right))
    largest = float(np.abs(right).max(initial=0.0))
    return (float(left @ right) / norms if norms else 1.0), float(np.abs(left - right).max(initial=0.0)) / max(largest, 1e-30)


def overflowing_nodes(model: ir.Model, feeds: Sequence[Feeds], half: Half = "fp16", share: float = 0.5) -> frozenset[str]:
    """Names of the nodes whose results go beyond `share` of the half type's range in the fp32 graph on `feeds`.

    Nodes without a name are given one, so that the same graph loaded again must be named the same way: `node.{index}`.
    """
    limit = float(np.finfo(np.float16).max if half == "fp16" else np.finfo(np.float32).max) * share
    name_nodes(model.graph)
    maker = {str(out.name): node for node in model.graph for out in node.outputs if out.dtype == _FLOAT and out.name}
    watched = {name: node for name, node in maker.items() if not node.outputs[0].is_graph_output()}
    for name in watched:
        value = next(out for out in watched[name].outputs if out.name == name)
        model.graph.outputs.append(value)
    found: set[str] = set()
    for results in run_model(model, feeds):
        for name, array in results.items():
            if name in maker and array.size and np.issubdtype(array.dtype, np.floating):
                top = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
                if limit < top < 1e30:  # masks are clipped, not widened
                    found.add(str(maker[name].name))
    return frozenset(found)


def name_nodes(graph: ir.Graph) -> None:
    """Names nodes without a name by their place."""
    for index, node in enumerate(graph):
        if not node.name:
            node.name = f"node.{index}"
