"""Operators for which ONNX Runtime's CUDA provider has no kernel of that element type."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from .base import Changes, GraphPass
from .dtypes import infer_dtypes, inner_graphs
from .graph import insert, like
from .islands import PRECISION

_NO_INTEGERS = frozenset({"ArgMax", "ArgMin", "Pad"})
_FULL_ONLY = frozenset({"GridSample", "RoiAlign"})


class CudaKernels(GraphPass):
    """ArgMax, ArgMin and Pad of whole numbers go through fp32; GridSample and RoiAlign are marked to stay fp32.

    A node without a kernel runs on the CPU: the device waits, its data are copied there and back, and no CUDA graph can be
    captured. What goes through fp32 here (token ids, numbers of blocks) is below 2²⁴ and stays exact. Kernels and their types:
    https://github.com/microsoft/onnxruntime/blob/main/docs/OperatorKernels.md#cudaexecutionprovider
    """

    name: ClassVar[str] = "cuda_kernels"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        infer_dtypes(model.graph)
        _rewrite(model.graph, changes)
        return changes


def _rewrite(graph: ir.Graph, changes: Changes) -> None:
    for node in list(graph):
        for branch in inner_graphs(node):
            _rewrite(branch, changes)
        if node.domain:
            continue
        if node.op_type in _FULL_ONLY and node.metadata_props.get(PRECISION) != "fp32":
            node.metadata_props[PRECISION] = "fp32"
            changes.add("kept in fp32")
        source = node.inputs[0] if node.inputs else None
        if node.op_type in _NO_INTEGERS and source is not None and source.dtype in (ir.DataType.INT64, ir.DataType.INT32):
            _through_float(graph, node, source)
            changes.add(f"{node.op_type} through fp32")


def _through_float(graph: ir.Graph, node: ir.Node, source: ir.Value) -> None:
    full, dtype, out = ir.DataType.FLOAT, source.dtype, node.outputs[0]
    assert dtype is not None
    for index in (0, 2):  # Pad's third input is what it fills with
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and value.dtype == dtype:
            cast = like(insert(node, "Cast", [value], {"to": int(full)}).outputs[0], value)
            cast.type, cast.name = ir.TensorType(full), f"{value.name}.of.{out.name}"
            node.replace_input_with(index, cast)
    if out.dtype == dtype and node.op_type == "Pad":
        back = ir.node("Cast", [out], {"to": int(dtype)})
        graph.insert_after(node, back)
        whole = like(back.outputs[0], out)
        out.name, whole.name = f"{out.name}.full", out.name
        out.type = ir.TensorType(full)
        out.replace_all_uses_with(whole, replace_graph_outputs=True)
        back.replace_input_with(0, out)
