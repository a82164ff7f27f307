"""Gemm becomes MatMul + Add, so that every weight has one spelling: `MatMul(x, W[K, N])`."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .base import Changes, GraphPass
from .graph import (
    add_initializer,
    attribute_float,
    attribute_int,
    attribute_ints,
    consumers,
    insert,
    is_weight,
    lazy_tensor,
    like,
    rank,
    remove_dead,
    substitute,
)


class GemmToMatMul(GraphPass):
    """Rewrites `Gemm(x, W, b)` with stored W into `Add(MatMul(x, W), b)`, and `MatMul(x, Transpose(W))` into `MatMul(x, Wᵀ)`.

    Quantisation, packing and the merging of projections all look for MatMul with a stored [K, N] weight; OPT's and GPT-2's
    layers come as Gemm, tied heads as MatMul of a transposed table. The transposed weight is computed when saved. ONNX
    Runtime turns a rank-2 MatMul + Add back into Gemm by itself, so fp32 graphs lose nothing.
    """

    name: ClassVar[str] = "gemm_to_matmul"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        for node in list(model.graph):
            if node.domain:
                continue
            if node.op_type == "Gemm":
                _gemm(model.graph, node, changes)
            elif node.op_type == "Transpose":
                _transposed_weight(model.graph, node, changes)
        return changes


def _gemm(graph: ir.Graph, node: ir.Node, changes: Changes) -> None:
    weight = node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    alpha, beta = attribute_float(node, "alpha", 1.0), attribute_float(node, "beta", 1.0)
    if weight is None or not is_weight(weight) or rank(weight) != 2:
        changes.note(f"{node.name}: Gemm of two computed matrices stays")
        return
    if alpha != 1.0 or (bias is not None and beta != 1.0) or attribute_int(node, "transA", 0):
        changes.note(f"{node.name}: Gemm with alpha, beta or a transposed input stays")
        return
    if attribute_int(node, "transB", 0):
        weight = transposed(graph, weight)
    product = insert(node, "MatMul", [node.inputs[0], weight], name=node.name)
    product.metadata_props.update(node.metadata_props)
    out = like(product.outputs[0], node.outputs[0])
    if bias is not None:
        out = like(insert(node, "Add", [out, bias]).outputs[0], node.outputs[0])
    substitute(node.outputs[0], out)
    remove_dead(graph, node)
    changes.add("Gemm → MatMul")


def _transposed_weight(graph: ir.Graph, node: ir.Node, changes: Changes) -> None:
    weight, out = node.inputs[0], node.outputs[0]
    if weight is None or not is_weight(weight) or rank(weight) != 2 or attribute_ints(node, "perm") not in (None, (1, 0)):
        return
    if out.is_graph_output() or any(user.op_type != "MatMul" or user.inputs[1] is not out for user in consumers(out)):
        return
    substitute(out, transposed(graph, weight))
    remove_dead(graph, node)
    changes.add("transposed weights folded")


def transposed(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    """A new stored tensor holding `weight` [a, b] as [b, a], computed when saved."""
    tensor = weight.const_value
    assert tensor is not None
    rows, columns = (int(size) for size in tensor.shape.numpy())
    name = f"{weight.name}.T"
    if (known := graph.initializers.get(name)) is not None:
        return known
    return add_initializer(graph, name, lazy_tensor(name, tensor.dtype, (columns, rows), lambda: np.asarray(tensor.numpy()).T))
