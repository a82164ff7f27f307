"""Which value of one graph stands for which value of another.

By name first: the exporter names values once, and a pass keeps the name of what it leaves alone. A pass that replaces a node
keeps the node's name, so its output stands for the old node's, where the two operators compute the same thing.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .metrics import Array, Distance, distance
from .probe import Probe

_REPLACED_BY = {
    "MatMul": {"MatMulNBits", "MatMulIntegerToFloat"},
    "RMSNormalization": {"SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"},
    "LayerNormalization": {"SkipLayerNormalization"},
    "Attention": {"GroupQueryAttention", "MultiHeadAttention", "If"},
    "Gather": {"GatherBlockQuantized"},
}
"""Operators of portable graphs, and those of builds whose first output is the same value."""

_BIAS = {"MatMulNBits": 5}
"""The input that adds a bias inside the operator: its output stands for that of the addition after the product."""


def pair_values(right: Probe, wrong: Probe) -> dict[str, str]:
    """Names of `wrong`'s values → names of `right`'s, in the order `wrong` computes them."""
    theirs, ours = right.values(), wrong.values()
    by_node = {node.name: node for node in right.nodes if node.name}
    pairs: dict[str, str] = {}
    for name, value in ours.items():
        if name in theirs:
            pairs[name] = name
            continue
        node = value.producer()
        partner = by_node.get(node.name) if node is not None and node.name else None
        if node is None or partner is None or node.outputs[0] is not value:
            continue
        found = _first_output(node, partner)
        if found is not None and found.name in theirs:
            pairs[name] = str(found.name)
    return pairs


def compare_values(name: str, found: Array, expected: Array) -> Distance | None:
    """Two values that stand for each other, or None where their shapes cannot be laid over one another.

    A cache of fixed capacity is compared where the growing one is; attention that merges its heads with the one that does
    not; rows of a batch that were flattened with those that were not.
    """
    if found.shape != expected.shape:
        laid = _laid_over(name, found, expected)
        if laid is None:
            return None
        found, expected = laid
    return distance(found, expected)


def _laid_over(name: str, found: Array, expected: Array) -> tuple[Array, Array] | None:
    if name.startswith("present.") and found.ndim == expected.ndim == 4 and found.shape[2] > expected.shape[2]:
        return found[:, :, : expected.shape[2]], expected
    if expected.ndim == 4 and found.ndim == 3:  # [batch, heads, sequence, size] and [batch, sequence, heads · size]
        batch, heads, sequence, size = expected.shape
        if found.shape == (batch, sequence, heads * size):
            return found, np.swapaxes(expected, 1, 2).reshape(found.shape)
        return None
    if found.size == expected.size and found.shape[-1:] == expected.shape[-1:]:
        return found.reshape(expected.shape), expected
    return None


def _first_output(node: ir.Node, partner: ir.Node) -> ir.Value | None:
    """The value of `partner` (or of the addition after it) that `node`'s first output stands for."""
    if node.op_type != partner.op_type and node.op_type not in _REPLACED_BY.get(partner.op_type, ()):
        return None
    result = partner.outputs[0]
    bias = _BIAS.get(node.op_type)
    if bias is None or len(node.inputs) <= bias or node.inputs[bias] is None:
        return result
    readers = [user for user, _ in result.uses()]
    return readers[0].outputs[0] if len(readers) == 1 and readers[0].op_type == "Add" else None
