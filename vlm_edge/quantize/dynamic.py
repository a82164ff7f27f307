"""int8 matrix products whose activation range is found while running."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import insert, like, remove_dead, substitute, typed

from .channelwise import linear_layers, store_channelwise


class DynamicInt8MatMul(GraphPass):
    """`MatMul(x, W)` with stored W → DynamicQuantizeLinear, MatMulInteger, Cast, Mul (standard ops).

    Activations become uint8 with the range of the tensor at hand, weights int8 with one scale per output channel; the product
    is exact in int32. ONNX Runtime fuses the four nodes (and a bias) into DynamicQuantizeMatMul when it loads them. Needs no
    calibration; since the range is that of the whole tensor, results depend slightly on what else is in the batch.

    `weight_bits` 7 keeps codes within ±63: on x86 without VNNI the kernel adds pairs of uint8 × int8 products in
    saturating int16, which 8-bit codes can overflow (2 · 255 · 127 > 32,767), 7-bit ones cannot. A build for machines that
    have VNNI or ARM's dot product may use 8.
    """

    name: ClassVar[str] = "dynamic_int8_matmul"

    def __init__(self, *, weight_bits: int = 7, keep_first: int = 0, keep_last: int = 0) -> None:
        if weight_bits not in (7, 8):
            raise ValueError(f"weight_bits must be 7 or 8, found {weight_bits}")
        self.weight_bits = weight_bits
        self.keep_first, self.keep_last = keep_first, keep_last

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        graph = model.graph
        stored: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        quantized: dict[ir.Value, list[ir.Value]] = {}
        for node, weight in list(linear_layers(graph, changes, self.keep_first, self.keep_last)):
            if weight not in stored:
                try:
                    stored[weight] = store_channelwise(graph, weight, self.weight_bits)
                except ValueError as error:
                    changes.note(f"{weight.name}: stays fp32: {error}")
                    continue
            source = node.inputs[0]
            assert source is not None
            if source not in quantized:
                outs = insert(node, "DynamicQuantizeLinear", [source], outputs=3).outputs
                typed(outs[0], ir.DataType.UINT8, source.shape or [])
                typed(outs[1], ir.DataType.FLOAT, [])
                typed(outs[2], ir.DataType.UINT8, [])
                quantized[source] = list(outs)
            codes, scale, zero = quantized[source]
            weight_codes, weight_scales = stored[weight]
            out = node.outputs[0]
            product = insert(node, "MatMulInteger", [codes, weight_codes, zero], name=node.name)
            product.metadata_props.update(node.metadata_props)
            integer = like(product.outputs[0], out)
            integer.type = ir.TensorType(ir.DataType.INT32)
            real = like(insert(node, "Cast", [integer], {"to": int(ir.DataType.FLOAT)}).outputs[0], out)
            both = typed(insert(node, "Mul", [scale, weight_scales]).outputs[0], ir.DataType.FLOAT, weight_scales.shape or [])
            substitute(out, like(insert(node, "Mul", [real, both]).outputs[0], out))
            remove_dead(graph, node)
            changes.add("int8 dynamic")
        for weight in stored:
            if not weight.uses():
                graph.initializers.pop(str(weight.name), None)
        return changes
