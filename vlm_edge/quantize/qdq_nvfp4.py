"""Weight-only 4-bit floating point with two levels of scales (NVFP4), for Blackwell."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import add_initializer, insert, lazy_tensor, like, typed
from vlm_edge.passes.islands import PRECISION

from .qdq_formats import FP4, FP8, Floats, at_least_opset, read_weight
from .qdq_linear import linear_nodes
from .weight_only import logits_products

BLOCK = 16
OPSET = 23
"""Where ONNX learnt 4-bit floating point."""


class Nvfp4Weights(GraphPass):
    """`MatMul(x, W)` → `MatMul(x, DQ(W fp4 [K, N], DQ(scales fp8 [K / 16, N], one fp32 scale), axis 0, block 16))`.

    W ≈ fp4 code · fp8 scale of its block · one scale of the matrix; that one is chosen so that the largest block's scale is
    fp8's largest number, 448. It stays fp32 (it is too small for fp16), so that W comes out in fp32 and is cast: the same form as
    NVIDIA's Model Optimizer writes. Format: https://developer.nvidia.com/blog/introducing-nvfp4-for-efficient-and-accurate-low-precision-inference/
    Weights whose rows are no multiple of 16 stay as they are, with a note.
    """

    name: ClassVar[str] = "nvfp4_weights"

    def __init__(self, *, body: bool = True, head: bool = False) -> None:
        self.body, self.head = body, head

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        graph = model.graph
        heads = logits_products(graph)
        stored: dict[ir.Value, ir.Value] = {}
        for node, weight in list(linear_nodes(graph)):
            if node.op_type != "MatMul" or not (self.head if node in heads else self.body):
                continue
            if weight not in stored:
                try:
                    stored[weight] = _store(graph, node, weight)
                except ValueError as error:
                    changes.note(f"{weight.name}: stays as it is: {error}")
                    continue
            node.replace_input_with(1, stored[weight])
            changes.add("nvfp4" + (" head" if node in heads else ""))
        if stored:
            at_least_opset(graph, OPSET)
        for weight in stored:
            if not weight.uses():
                graph.initializers.pop(str(weight.name), None)
        return changes


def nvfp4_scales(weight: Floats) -> tuple[np.float32, npt.NDArray[np.generic]]:
    """(scale of the matrix, fp8 scales [K / 16, N]) of a weight [K, N]. Raises ValueError on NaN, infinity, or odd K."""
    depth, width = weight.shape
    if depth % BLOCK:
        raise ValueError(f"{depth} rows are no multiple of {BLOCK}")
    largest = np.abs(weight).reshape(depth // BLOCK, BLOCK, width).max(axis=1)
    top = float(largest.max(initial=0.0))
    if not np.isfinite(top):
        raise ValueError("the weight has NaN or infinite values: it cannot be quantised")
    whole = np.float32(top / (FP4.top * FP8.top)) if top else np.float32(1)
    return whole, FP8.codes((largest / FP4.top / whole).astype(np.float32))


def _store(graph: ir.Graph, before: ir.Node, weight: ir.Value) -> ir.Value:
    read, shape = read_weight(weight)
    whole, blocks = nvfp4_scales(read())
    name = f"{weight.name}.fp4"

    def make() -> npt.NDArray[np.generic]:
        scales = np.repeat(blocks.astype(np.float32) * whole, BLOCK, axis=0)
        return FP4.codes(np.divide(read(), scales, out=np.zeros(shape, np.float32), where=scales > 0))

    codes = add_initializer(graph, name, lazy_tensor(name, FP4.onnx, shape, make))
    inner = add_initializer(graph, f"{name}.scales", ir.Tensor(blocks, dtype=FP8.onnx, name=f"{name}.scales"))
    outer = ir.Tensor(np.array(whole, np.float32), dtype=ir.DataType.FLOAT, name=f"{name}.scale")
    scales = insert(before, "DequantizeLinear", [inner, add_initializer(graph, f"{name}.scale", outer)])
    node = insert(before, "DequantizeLinear", [codes, scales.outputs[0]], {"axis": 0, "block_size": BLOCK})
    typed(scales.outputs[0], ir.DataType.FLOAT, blocks.shape)
    for made in (scales, node):
        made.metadata_props[PRECISION] = "fp32"
    return like(node.outputs[0], weight)
