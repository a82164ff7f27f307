"""Building graphs of a few nodes in code, and running them for real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort


class Sketch:
    """A graph being written down: `node(...)` returns values, `weight(...)` stores tensors."""

    def __init__(self, opset: int = 23) -> None:
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self.opset = opset

    def input(self, name: str, shape: Sequence[Any], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def weight(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(np.asarray(array), name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(np.shape(array)))
        self.weights.append(value)
        return value

    def node(self, op_type, inputs, attributes=None, *, shape=None, shapes=None, domain="", name=None, dtype=ir.DataType.FLOAT):
        """`shape` for one output, `shapes` for several; returns a value or a list of them."""
        wanted = shapes if shapes is not None else [shape]
        made = ir.node(op_type, inputs, attributes or {}, domain=domain, num_outputs=len(wanted), name=name)
        for out, dims in zip(made.outputs, wanted, strict=True):
            out.type = ir.TensorType(dtype)
            out.shape = ir.Shape(dims) if dims is not None else None
        self.nodes.append(made)
        return made.outputs[0] if shapes is None else list(made.outputs)

    def output(self, name: str, value: ir.Value) -> None:
        value.name = name
        self.outputs.append(value)

    def model(self) -> ir.Model:
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=self.weights,
            opset_imports={"": self.opset, "com.microsoft": 1},
            name="sketch",
        )
        return ir.Model(graph, ir_version=11)


def run(model: ir.Model, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Runs a model on ONNX Runtime's CPU provider, unoptimised so that what is written is what runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()] if outputs is None else list(outputs)
    return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in taken}), strict=True))


def ops(model: ir.Model) -> list[str]:
    """The operators of a graph, in order."""
    return [node.op_type for node in model.graph]


def largest_difference(left: np.ndarray, right: np.ndarray) -> float:
    """Largest absolute difference; NaN in either counts as infinite."""
    assert left.shape == right.shape, (left.shape, right.shape)
    difference = np.abs(left.astype(np.float64) - right.astype(np.float64))
    return float("inf") if np.isnan(difference).any() else float(difference.max(initial=0.0))
