"""What the tests of engines share: a listener that remembers, a few graphs, a stand-in for the TensorRT that cannot be had."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vlm_edge.targets.backend import CompileOptions

SMS = (86, 89, 120)
HALF = TensorProto.FLOAT16
ALL = CompileOptions(sm=SMS)


class Remembered:
    """A progress listener that keeps what each step ended with."""

    def __init__(self) -> None:
        self.steps: dict[str, str] = {}
        self.totals: dict[str, float] = {}

    def start(self, step: str, total: float | None = None) -> None:
        self.steps[step] = ""
        self.totals[step] = 0.0

    def advance(self, step: str, amount: float = 1.0) -> None:
        assert amount > 0, "a bar never goes back"
        self.totals[step] += amount

    def done(self, step: str, detail: str = "") -> None:
        self.steps[step] = detail

    def failed(self, step: str, reason: str) -> None:
        self.steps[step] = f"failed: {reason}"

    def engines(self) -> dict[str, str]:
        """Graph → how its engine's step ended."""
        return {step.split()[1]: detail for step, detail in self.steps.items() if step.startswith("engine ")}


def value(name: str, shape: list, dtype: int = HALF):
    return helper.make_tensor_value_info(name, dtype, shape)


def save(path: Path, nodes: list, inputs: list, outputs: list, weights: dict | None = None, opset: int = 24) -> Path:
    """Writes a graph of plain onnx nodes."""
    stored = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def cached_attention(path: Path, *, mask: bool = True) -> Path:
    """One attention over a cache that is written in place; with a mask, or with the lengths that TensorRT's parser leaves out."""
    caches = [value(f"past_key_values.0.{part}", ["batch", 2, 64, 16]) for part in ("key", "value")]
    fresh = [value(part, ["batch", 2, "sequence", 16]) for part in ("k", "v")]
    last = value("mask", ["batch", 1, "sequence", 64]) if mask else value("lengths", ["batch"], TensorProto.INT64)
    inputs = [
        value("q", ["batch", 4, "sequence", 16]),
        *fresh,
        *caches,
        value("past_lengths", ["batch"], TensorProto.INT32),
        last,
    ]
    nodes = [helper.make_node("Cast", ["past_lengths"], ["slots"], name="slots", to=TensorProto.INT64)]
    for part, new in (("key", "k"), ("value", "v")):
        taken = [f"past_key_values.0.{part}", new, "slots"]
        nodes.append(helper.make_node("TensorScatter", taken, [f"present.0.{part}"], name=f"write_{part}", axis=-2))
    given = ["q", "present.0.key", "present.0.value", *(["mask"] if mask else ["", "", "", "lengths"])]
    nodes.append(helper.make_node("Attention", given, ["out"], name="attention", is_causal=int(not mask)))
    outputs = [value("out", ["batch", 4, "sequence", 16])]
    outputs += [value(f"present.0.{part}", ["batch", 2, 64, 16]) for part in ("key", "value")]
    return save(path, nodes, inputs, outputs)


def linear(path: Path, width: int = 64) -> Path:
    """x [rows, width] → y [rows, width], one product."""
    weight = np.random.default_rng(0).standard_normal((width, width)).astype(np.float16)
    product = helper.make_node("MatMul", ["x", "weight"], ["y"], name="product")
    return save(path, [product], [value("x", ["rows", width])], [value("y", ["rows", width])], {"weight": weight})


def stand_in_tensorrt(version: str) -> types.ModuleType:
    """A module `tensorrt` of that version, for the paths that only the full TensorRT takes, which cannot be installed here.

    Its builder is TensorRT-RTX's. That shows that the path holds together, not that TensorRT takes the graphs.
    """
    import tensorrt_rtx

    module = types.ModuleType("tensorrt")
    module.__dict__.update({name: thing for name, thing in vars(tensorrt_rtx).items() if not name.startswith("__")})
    module.__version__ = version
    return module
