"""int8 matrix products with activation ranges fixed by calibration (QDQ, S8S8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import add_initializer, insert, like, typed

from .channelwise import linear_layers, store_channelwise


class StaticInt8MatMul(GraphPass):
    """`MatMul(x, W)` → `MatMul(DQ(Q(x)), DQ(W int8))` with one fixed symmetric scale for x and one per channel for W.

    Symmetric int8 on both sides is the form that ONNX Runtime fuses to integer kernels and that TensorRT accepts (it
    refuses zero points). Cheaper than dynamic ranges (nothing is measured while running) and independent of what else is in
    the batch; needs inputs to calibrate on. `thresholds` gives, per value name, the magnitude of code 127; layers whose
    input is not named stay fp32, with a note. `weight_bits`: see DynamicInt8MatMul.
    """

    name: ClassVar[str] = "static_int8_matmul"

    def __init__(self, thresholds: Mapping[str, float], *, weight_bits: int = 7, keep_first: int = 0, keep_last: int = 0) -> None:
        if weight_bits not in (7, 8):
            raise ValueError(f"weight_bits must be 7 or 8, found {weight_bits}")
        self.thresholds = thresholds
        self.weight_bits = weight_bits
        self.keep_first, self.keep_last = keep_first, keep_last

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        graph = model.graph
        weights: dict[ir.Value, ir.Value] = {}
        activations: dict[ir.Value, ir.Value] = {}
        for node, weight in list(linear_layers(graph, changes, self.keep_first, self.keep_last)):
            source = node.inputs[0]
            assert source is not None
            if source not in activations:
                threshold = self.thresholds.get(str(source.name))
                if threshold is None:
                    changes.note(f"{weight.name}: stays fp32: its input was not calibrated")
                    continue
                activations[source] = _round_trip(graph, node, source, threshold)
            if weight not in weights:
                try:
                    codes, scales = store_channelwise(graph, weight, self.weight_bits)
                except ValueError as error:
                    changes.note(f"{weight.name}: stays fp32: {error}")
                    continue
                real = insert(node, "DequantizeLinear", [codes, scales], {"axis": 1}).outputs[0]
                weights[weight] = like(real, weight)
            node.replace_input_with(0, activations[source])
            node.replace_input_with(1, weights[weight])
            changes.add("int8 static")
        for weight in weights:
            if not weight.uses():
                graph.initializers.pop(str(weight.name), None)
        return changes


def calibrated_inputs(model: ir.Model) -> list[str]:
    """Names of the values whose ranges `StaticInt8MatMul` needs."""
    pairs = linear_layers(model.graph, Changes("calibration"), 0, 0)
    return list(dict.fromkeys(str(node.inputs[0].name) for node, _ in pairs if node.inputs[0] is not None))


def _round_trip(graph: ir.Graph, before: ir.Node, value: ir.Value, threshold: float) -> ir.Value:
    """Q then DQ of an activation: int8, zero point 0."""
    scale = add_initializer(graph, f"{value.name}.scale", np.array(max(threshold, 1e-12) / 127, np.float32))
    zero = add_initializer(graph, f"{value.name}.zero", np.array(0, np.int8))
    codes = insert(before, "QuantizeLinear", [value, scale, zero]).outputs[0]
    typed(codes, ir.DataType.INT8, value.shape or [])
    return like(insert(before, "DequantizeLinear", [codes, scale, zero]).outputs[0], value)
