"""Activation functions as graphs spell them, and the gated products they are part of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlm_edge.passes.graph import MICROSOFT, attribute_float, only_consumer, producer, scalar

from .plan_file import Unary

_SQRT_2_OVER_PI = 0.7978845608028654


@dataclass(slots=True, frozen=True)
class Activation:
    """`kind` of `source`, and the nodes that compute it, the last one first."""

    kind: Unary
    source: ir.Value
    nodes: tuple[ir.Node, ...]


def activation(value: ir.Value | None) -> Activation | None:
    """The activation function that computes `value`, if it is one."""
    node = value.producer() if value is not None else None
    if node is None or not node.inputs or node.inputs[0] is None:
        return None
    source = node.inputs[0]
    if node.domain == MICROSOFT:
        if node.op_type == "QuickGelu":
            alpha = attribute_float(node, "alpha", 1.702)
            kind = Unary.SILU if alpha == 1.0 else Unary.QUICK_GELU if abs(alpha - 1.702) < 1e-6 else None
            return Activation(kind, source, (node,)) if kind is not None else None
        kind = {"Gelu": Unary.GELU, "FastGelu": Unary.GELU_TANH}.get(node.op_type)
        return Activation(kind, source, (node,)) if kind is not None and len(node.inputs) == 1 else None
    if node.domain:
        return None
    if node.op_type == "Gelu":
        mode = node.attributes["approximate"].as_string() if "approximate" in node.attributes else "none"
        return Activation(Unary.GELU_TANH if mode == "tanh" else Unary.GELU, source, (node,))
    if node.op_type == "Relu":
        return Activation(Unary.RELU, source, (node,))
    if node.op_type == "Mul":
        return _times_sigmoid(node) or _tanh_gelu(node)
    return None


def _times_sigmoid(node: ir.Node) -> Activation | None:
    """x · sigmoid(x), or x · sigmoid(1.702 x)."""
    for x, gate in (node.inputs, node.inputs[::-1]):
        sigmoid = producer(gate, "Sigmoid")
        if sigmoid is None or x is None:
            continue
        if sigmoid.inputs[0] is x:
            return Activation(Unary.SILU, x, (node, sigmoid))
        scaled = producer(sigmoid.inputs[0], "Mul")
        if scaled is not None:
            for left, right in (scaled.inputs, scaled.inputs[::-1]):
                factor = scalar(right)
                if left is x and factor is not None and abs(factor - 1.702) < 1e-6:
                    return Activation(Unary.QUICK_GELU, x, (node, sigmoid, scaled))
    return None


def _tanh_gelu(node: ir.Node) -> Activation | None:
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))) as GPT-2 writes it."""
    for half, grown in (node.inputs, node.inputs[::-1]):
        halved, one = _by_constant(half, "Mul", 0.5), _by_constant(grown, "Add", 1.0)
        tanh = producer(one[0], "Tanh") if one else None
        scaled = _by_constant(tanh.inputs[0], "Mul", _SQRT_2_OVER_PI) if tanh is not None else None
        total = producer(scaled[0], "Add") if scaled else None
        if halved is None or one is None or tanh is None or scaled is None or total is None:
            continue
        x = halved[0]
        for left, right in (total.inputs, total.inputs[::-1]):
            cubed = _by_constant(right, "Mul", 0.044715)
            power = producer(cubed[0], "Pow") if cubed else None
            if left is x and cubed is not None and power is not None and power.inputs[0] is x and scalar(power.inputs[1]) == 3.0:
                return Activation(Unary.GELU_TANH, x, (node, halved[1], one[1], tanh, scaled[1], total, cubed[1], power))
    return None


def _by_constant(value: ir.Value | None, op: str, number: float) -> tuple[ir.Value, ir.Node] | None:
    """(x, the node) where `value` = x op number."""
    node = producer(value, op)
    if node is None:
        return None
    for x, given in (node.inputs, node.inputs[::-1]):
        found = scalar(given)
        if x is not None and found is not None and np.isclose(found, number, rtol=1e-5, atol=0):
            return x, node
    return None


@dataclass(slots=True, frozen=True)
class Gated:
    """activation(gate) · up: the two products' outputs, and all nodes from behind them to the multiplication."""

    kind: Unary
    gate: ir.Value
    up: ir.Value
    nodes: tuple[ir.Node, ...]


def gated(node: ir.Node) -> Gated | None:
    """`node` as the multiplication of a gated layer, if nothing else reads what comes between."""
    if node.op_type != "Mul" or node.domain or activation(node.outputs[0]) is not None:
        return None
    for left, right in (node.inputs, node.inputs[::-1]):
        found = activation(left)
        if found is None or right is None or left is None or found.source is right:
            continue
        inner = set(found.nodes)
        closed = all(
            use in inner or use is node
            for one in found.nodes
            for out in one.outputs
            for use in (usage.node for usage in out.uses())
        )
        if closed and all(usage.node in inner for usage in found.source.uses()) and only_consumer(right) is node:
            return Gated(found.kind, found.source, right, (node, *found.nodes))
    return None
