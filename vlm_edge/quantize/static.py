"""int8 matrix products with activation ranges fixed by calibration (QDQ, S8S8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import MICROSOFT, add_initializer, insert, like, remove_dead, substitute, typed

from .channelwise import linear_layers, store_channelwise


class StaticInt8MatMul(GraphPass):
    """`MatMul(x, W)` → `MatMul(DQ(Q(x)), DQ(W int8))` with one fixed symmetric scale for x and one per channel for W.

    Symmetric int8 on both sides is the form that TensorRT accepts (it refuses zero points) and that ONNX Runtime fuses to
    its integer kernel, except where one quantised x feeds several products (query, key, value): with `fused` that kernel
    (com.microsoft MatMulIntegerToFloat) is written down directly, on the same codes moved to uint8 (its x86 kernels for
    int8 activations are several times slower). Cheaper than dynamic ranges (nothing is measured while
    running) and independent of what else is in the batch; needs inputs to calibrate on. `thresholds` gives, per value name,
    the magnitude of code 127; layers whose input is not named stay fp32, with a note. `weight_bits`: see DynamicInt8MatMul.
    """

    name: ClassVar[str] = "static_int8_matmul"

    def __init__(
        self,
        thresholds: Mapping[str, float],
        *,
        fused: bool = False,
        weight_bits: int = 7,
        keep_first: int = 0,
        keep_last: int = 0,
    ) -> None:
        if weight_bits not in (7, 8):
            raise ValueError(f"weight_bits must be 7 or 8, found {weight_bits}")
        self.thresholds = thresholds
        self.fused = fused
        self.weight_bits = weight_bits
        self.keep_first, self.keep_last = keep_first, keep_last

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        graph = model.graph
        weights: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        activations: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
        for node, weight in list(linear_layers(graph, changes, self.keep_first, self.keep_last)):
            source = node.inputs[0]
            assert source is not None
            if source not in activations:
                threshold = self.thresholds.get(str(source.name))
                if threshold is None:
                    changes.note(f"{weight.name}: stays fp32: its input was not calibrated")
                    continue
                activations[source] = _quantized(graph, node, source, threshold, self.fused)
            if weight not in weights:
                try:
                    weights[weight] = store_channelwise(graph, weight, self.weight_bits)
                except ValueError as error:
                    changes.note(f"{weight.name}: stays fp32: {error}")
                    continue
            if self.fused:
                _integer_product(graph, node, activations[source], weights[weight])
            else:
                real = insert(node, "DequantizeLinear", activations[source])
                node.replace_input_with(0, like(real.outputs[0], source))
                back = insert(node, "DequantizeLinear", weights[weight], {"axis": 1})
                node.replace_input_with(1, like(back.outputs[0], weight))
            changes.add("int8 static")
        for weight in weights:
            if not weight.uses():
                graph.initializers.pop(str(weight.name), None)
        return changes


def calibrated_inputs(model: ir.Model) -> list[str]:
    """Names of the values whose ranges `StaticInt8MatMul` needs."""
    pairs = linear_layers(model.graph, Changes("calibration"), 0, 0)
    return list(dict.fromkeys(str(node.inputs[0].name) for node, _ in pairs if node.inputs[0] is not None))


def _quantized(
    graph: ir.Graph, before: ir.Node, value: ir.Value, threshold: float, unsigned: bool
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(codes, scale, zero point) of an activation: int8 around 0, or the same moved to uint8 around 128."""
    scale = add_initializer(graph, f"{value.name}.scale", np.array(max(threshold, 1e-12) / 127, np.float32))
    zero = add_initializer(graph, f"{value.name}.zero", np.array(128, np.uint8) if unsigned else np.array(0, np.int8))
    codes = insert(before, "QuantizeLinear", [value, scale, zero]).outputs[0]
    return typed(codes, zero.dtype, value.shape or []), scale, zero


def _integer_product(
    graph: ir.Graph, node: ir.Node, activation: tuple[ir.Value, ir.Value, ir.Value], weight: tuple[ir.Value, ir.Value]
) -> None:
    (codes, scale, zero), (weight_codes, weight_scales) = activation, weight
    product = insert(
        node,
        "MatMulIntegerToFloat",
        [codes, weight_codes, scale, weight_scales, zero],
        domain=MICROSOFT,
        name=node.name,
    )
    product.metadata_props.update(node.metadata_props)
    substitute(node.outputs[0], like(product.outputs[0], node.outputs[0]))
    remove_dead(graph, node)
