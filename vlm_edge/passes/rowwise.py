"""Which nodes treat every row (token) by itself: what they compute for one row does not depend on the others."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .graph import MICROSOFT, attribute_int, fixed_dim, is_weight, rank

_ELEMENTWISE = frozenset(
    {
        *("Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu"),
        *("Log", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Swish"),
        *("Tanh", "Where"),
    }
)
_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
_FUSED = frozenset({"BiasGelu", "FastGelu", "Gelu", "QuickGelu", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})


def is_rowwise(node: ir.Node, ranks: Sequence[int] = (3,)) -> bool:
    """Whether a node maps rows to rows: every computed input and output has one of `ranks` dimensions, the last one is the

    row's content, and stored operands are the same for all rows.
    """
    computed = [value for value in node.inputs if value is not None and not is_weight(value)]
    if not computed or any(rank(value) not in ranks for value in computed):
        return False
    if node.domain == MICROSOFT:
        return node.op_type in _FUSED or node.op_type == "MatMulNBits"
    if node.domain:
        return False
    if node.op_type in _ELEMENTWISE:
        return all(_one_row(value) for value in node.inputs if value is not None and is_weight(value))
    if node.op_type in _NORMS:
        size = rank(node.inputs[0])
        return attribute_int(node, "axis", -1) in (-1, (size or 0) - 1)
    if node.op_type == "Concat":
        size = rank(node.outputs[0])
        return len(computed) == len(node.inputs) and attribute_int(node, "axis", 0) in (-1, (size or 0) - 1)
    if node.op_type == "MatMul":
        return len(computed) == 1 and computed[0] is node.inputs[0] and rank(node.inputs[1]) == 2
    return False


def _one_row(value: ir.Value) -> bool:
    """Whether a stored operand of an elementwise node is shared by all rows (scalar, [width], [1, width], …)."""
    size = rank(value)
    return size is not None and all(fixed_dim(value, axis) == 1 for axis in range(size - 1))
