"""Element types of values that a pass left without one."""

from __future__ import annotations

import onnx_ir as ir

_BOOL = frozenset({"And", "Or", "Xor", "Not", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf"})
_INT64 = frozenset({"Shape", "Size", "ArgMax", "ArgMin", "NonZero"})
_LIKE_SECOND = frozenset({"Where", "DequantizeLinear"})
"""Results have the type of the second input."""
_TOLD = {"Cast": "to", "EyeLike": "dtype", "RandomNormal": "dtype", "RandomUniform": "dtype"}


def infer_dtypes(graph: ir.Graph) -> int:
    """Fills in missing element types of node outputs, in graph order; returns how many were missing.

    By the operators' definitions: comparisons are boolean, shapes int64, a Cast says so itself, all others follow their first
    input. Raises ValueError for one whose inputs have no type either.
    """
    missing = 0
    for node in graph:
        branches = inner_graphs(node)
        missing += sum(infer_dtypes(branch) for branch in branches)
        for index, out in enumerate(node.outputs):
            if out.dtype is None and (out.name or out.uses()):
                inner = branches[-1].outputs[index].dtype if branches and node.op_type == "If" else None
                out.type = ir.TensorType(inner if inner is not None else _dtype(node, index))
                missing += 1
    return missing


def inner_graphs(node: ir.Node) -> list[ir.Graph]:
    """The subgraphs of a node (the branches of If, the body of Loop)."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found += attribute.as_graphs()
    return found


def _dtype(node: ir.Node, index: int) -> ir.DataType:
    op = node.op_type if not node.domain else ""
    if op in _BOOL:
        return ir.DataType.BOOL
    if op in _INT64 or (op == "TopK" and index == 1):
        return ir.DataType.INT64
    if op in _TOLD and _TOLD[op] in node.attributes:
        return ir.DataType(node.attributes[_TOLD[op]].as_int())
    if op == "Constant" and "value" in node.attributes:
        return ir.DataType(node.attributes["value"].as_tensor().dtype)
    if op == "ConstantOfShape":
        return ir.DataType(node.attributes["value"].as_tensor().dtype) if "value" in node.attributes else ir.DataType.FLOAT
    if op == "QuantizeLinear":
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        return zero.dtype if zero is not None and zero.dtype is not None else ir.DataType.UINT8
    source = node.inputs[1] if op in _LIKE_SECOND else next((value for value in node.inputs if value is not None), None)
    if source is None or source.dtype is None:
        raise ValueError(f"{node.op_type} {node.name or node.outputs[0].name}: its element type is not known")
    return source.dtype
