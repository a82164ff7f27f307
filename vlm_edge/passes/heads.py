"""Between the two layouts of attention: [batch, heads, sequence, size] and [batch, sequence, heads · size]."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlm_edge_runtime.errors import TargetError

from .graph import add_initializer, attribute_int, fixed_dim, insert, rank, typed


def merge_heads(before: ir.Node, value: ir.Value | None) -> ir.Value:
    """[batch, heads, sequence, size] → [batch, sequence, heads · size], by nodes in front of `before`.

    A 3-D value is returned as it is. Raises TargetError when its shape is not known.
    """
    if value is None or value.shape is None or not isinstance(before.graph, ir.Graph):
        raise TargetError(f"{before.op_type} {before.name!r}: query, key and value need known shapes; run shape inference first.")
    if len(value.shape) == 3:
        return value
    batch, heads, sequence, size = value.shape
    turned = insert(before, "Transpose", [value], {"perm": [0, 2, 1, 3]}).outputs[0]
    typed(turned, value.dtype, [batch, sequence, heads, size])
    shape = add_initializer(before.graph, "merge_heads.shape", np.array([0, 0, -1], np.int64))
    width = heads * size if isinstance(heads, int) and isinstance(size, int) else None
    return typed(insert(before, "Reshape", [turned, shape]).outputs[0], value.dtype, [batch, sequence, width])


def split_heads(before: ir.Node, value: ir.Value, heads: int, size: int) -> ir.Value:
    """[batch, sequence, heads · size] → [batch, heads, sequence, size], by nodes in front of `before`."""
    assert value.shape is not None and isinstance(before.graph, ir.Graph)
    batch, sequence = value.shape[0], value.shape[1]
    shape = add_initializer(before.graph, "split_heads.shape", np.array([0, 0, heads, size], np.int64))
    split = typed(insert(before, "Reshape", [value, shape]).outputs[0], value.dtype, [batch, sequence, heads, size])
    turned = insert(before, "Transpose", [split], {"perm": [0, 2, 1, 3]}).outputs[0]
    return typed(turned, value.dtype, [batch, heads, sequence, size])


def attention_heads(node: ir.Node) -> tuple[int, int, int]:
    """(query heads, KV heads, head size) of an Attention node, from its 4-D past and its query.

    Raises TargetError where they are no fixed numbers.
    """
    kv_heads, head_dim = fixed_dim(node.inputs[4], 1), fixed_dim(node.inputs[4], 3)
    query = node.inputs[0]
    heads = fixed_dim(query, 1) if rank(query) == 4 else attribute_int(node, "q_num_heads", 0)
    if not heads or not kv_heads or not head_dim:
        raise TargetError(f"Attention node {node.name!r}: the number of heads and their size must be fixed numbers.")
    return heads, kv_heads, head_dim
