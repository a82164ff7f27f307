"""4-bit and 8-bit weight-only matrix products."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass
from vlm_edge.passes.graph import (
    MICROSOFT,
    add_initializer,
    fixed_dim,
    insert,
    is_weight,
    lazy_tensor,
    like,
    only_consumer,
    producer,
    rank,
    remove_dead,
    substitute,
)

from .blockwise import BlockFormat, Codes, Floats, choose_scales, pack, quantize

_AFTER_HEAD = frozenset(
    {
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Tanh",
        "Cast",
        "Identity",
        "Gather",
        "Squeeze",
        "Where",
        "Max",
        "Min",
        "Clip",
        "Slice",
        "Reshape",
    }
)
"""What may stand between the head and the logits: bias, scale, soft-cap, words that must not come."""


class WeightOnlyMatMul(GraphPass):
    """`MatMul(x, W)` with a stored W [K, N] → com.microsoft `MatMulNBits` with W in 4 or 8 bits, blockwise along K.

    One token's matrix products read every weight once and compute little: a quarter or an eighth of the bytes is that much
    less time. Activations stay fp32 outside; with `accuracy_level` 4 the kernel quantises them to int8 per block on the
    fly (the only fast path on x86: levels 0 and 1 are 5 to 80 times slower), with 1 it computes in fp32. A bias added
    right after goes into the node. `head` is the format of the product that makes the logits (None: like the others).
    Rows of scales are held in memory (1/32 of the weights at block 32); the codes are computed when saved.
    """

    name: ClassVar[str] = "weight_only_matmul"

    def __init__(
        self,
        form: BlockFormat | None,
        *,
        head: BlockFormat | None = None,
        keep_head: bool = False,
        accuracy_level: int = 4,
    ) -> None:
        """`form` None quantises the head alone; `keep_head` leaves the head in fp32."""
        self.form = form
        self.head = None if keep_head else head or form
        self.accuracy_level = accuracy_level

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        graph = model.graph
        heads = logits_products(graph)
        stored: dict[tuple[ir.Value, BlockFormat], list[ir.Value]] = {}
        for node in [n for n in graph if n.op_type == "MatMul" and not n.domain]:
            weight = node.inputs[1]
            form = self.head if node in heads else self.form
            if form is None or weight is None or not is_weight(weight):
                continue
            label = str(weight.name)
            if rank(weight) != 2 or weight.dtype != ir.DataType.FLOAT:
                changes.note(f"{label}: {weight.dtype} {weight.shape} stays as it is (only fp32 matrices are quantised)")
                continue
            if (weight, form) not in stored:
                try:
                    stored[weight, form] = _store(graph, weight, form)
                except ValueError as error:
                    changes.note(f"{label}: stays fp32: {error}")
                    continue
                depth = fixed_dim(weight, 0) or 0
                if depth % form.block_size:
                    changes.note(f"{label}: {depth} rows padded to {form.blocks(depth) * form.block_size}")
            _replace(graph, node, weight, stored[weight, form], form, self.accuracy_level)
            changes.add(f"int{form.bits} block {form.block_size}" + (" head" if node in heads and form != self.form else ""))
        return changes


def logits_products(graph: ir.Graph) -> list[ir.Node]:
    """The MatMuls that make the logits, behind at most elementwise nodes (bias, soft-capping, scaling).

    Several where added tokens have a matrix of their own, whose logits are appended (IDEFICS); none if any are made otherwise.
    """
    products: list[ir.Node] = []
    values = [out for out in graph.outputs if out.name == "logits"]
    while values:
        node = values.pop().producer()
        if node is None or node.domain:
            return []
        if node.op_type == "MatMul":
            if not is_weight(node.inputs[1]):
                return []
            products.append(node)
            continue
        computed = [v for v in node.inputs if v is not None and not is_weight(v)]
        if node.op_type != "Concat" and (node.op_type not in _AFTER_HEAD or len(computed) != 1):
            return []
        values += computed
    return products


def _store(graph: ir.Graph, weight: ir.Value, form: BlockFormat) -> list[ir.Value]:
    """Codes, scales and (if asymmetric) zero points of a weight [K, N] as stored tensors, for rows of Wᵀ."""
    tensor = weight.const_value
    assert tensor is not None
    depth, width = (int(size) for size in tensor.shape.numpy())
    name = str(weight.name)

    def rows() -> Floats:
        return np.asarray(tensor.numpy(), np.float32).T

    scales, zeros = choose_scales(rows(), form)

    def codes() -> Codes:
        return pack(quantize(rows(), scales, zeros, form), form.bits)

    shape = (width, form.blocks(depth), form.block_size * form.bits // 8)
    suffix = f".int{form.bits}"
    values = [
        add_initializer(graph, name + suffix, lazy_tensor(name + suffix, ir.DataType.UINT8, shape, codes)),
        add_initializer(graph, name + suffix + ".scales", scales),
    ]
    if zeros is not None:
        values.append(add_initializer(graph, name + suffix + ".zeros", pack(zeros, form.bits)))
    return values


def _replace(
    graph: ir.Graph, node: ir.Node, weight: ir.Value, stored: list[ir.Value], form: BlockFormat, accuracy_level: int
) -> None:
    depth, width = fixed_dim(weight, 0), fixed_dim(weight, 1)
    assert depth is not None and width is not None
    end, bias = _bias(node, width)
    inputs: list[ir.Value | None] = [node.inputs[0], *stored]
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [bias]
    attributes = {"K": depth, "N": width, "bits": form.bits, "block_size": form.block_size, "accuracy_level": accuracy_level}
    product = insert(end, "MatMulNBits", inputs, attributes, domain=MICROSOFT, name=node.name)
    product.metadata_props.update(node.metadata_props)
    like(product.outputs[0], end.outputs[0])
    substitute(end.outputs[0], product.outputs[0])
    remove_dead(graph, end)
    if not weight.uses() and weight.name in graph.initializers:
        del graph.initializers[str(weight.name)]


def _bias(node: ir.Node, width: int) -> tuple[ir.Node, ir.Value | None]:
    """(last node of the linear layer, its bias): the Add of a stored [N] vector right after, if there is one."""
    add = only_consumer(node.outputs[0])
    if add is None or add is not producer(add.outputs[0], "Add"):
        return node, None
    bias = next((v for v in add.inputs if v is not None and is_weight(v) and rank(v) == 1), None)
    return (add, bias) if bias is not None and fixed_dim(bias, 0) == width else (node, None)
