"""Running a piece of a graph at compile time, to know what it computes instead of guessing from its shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort


def graph_inputs_of(values: Sequence[ir.Value]) -> list[ir.Value]:
    """The graph inputs that `values` depend on, in the order they were met."""
    found: dict[ir.Value, None] = {}
    seen: set[ir.Value] = set()
    todo = list(values)
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.is_graph_input():
            found[value] = None
        elif (node := value.producer()) is not None:
            todo += [source for source in node.inputs if source is not None]
    return list(found)


def evaluate(
    graph: ir.Graph, outputs: Sequence[ir.Value], feeds: Mapping[str, npt.NDArray[Any]], *, ir_version: int = 11
) -> list[npt.NDArray[Any]]:
    """Computes `outputs` with ONNX Runtime from the graph inputs in `feeds`; the graph itself is not changed.

    Every graph input that the outputs depend on must be fed. Raises ValueError when one is missing.
    """
    needed = graph_inputs_of(outputs)
    missing = [value.name for value in needed if value.name not in feeds]
    if missing:
        raise ValueError(f"these values depend on graph inputs that are not fed: {missing}")
    piece = ir.convenience.extract(graph, needed, outputs)
    names = [f"out.{index}" for index in range(len(piece.outputs))]
    tail = [ir.node("Identity", [value]) for value in piece.outputs]
    piece.extend(tail)
    types = [value.type for value in outputs]
    piece.outputs.clear()
    for name, node, type_ in zip(names, tail, types, strict=True):
        node.outputs[0].name, node.outputs[0].type = name, type_
        piece.outputs.append(node.outputs[0])
    for value in piece.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):  # a session made from bytes has no folder to read from
            value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
    session = session_of(ir.Model(piece, ir_version=ir_version))
    taken = {value.name for value in session.get_inputs()}
    return [np.asarray(out) for out in session.run(names, {name: feeds[name] for name in feeds if name in taken})]


def session_of(model: ir.Model) -> ort.InferenceSession:
    """A single-threaded CPU session of a small model held in memory."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
