"""Query, key and value projections become one matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .base import Changes, GraphPass
from .graph import (
    MICROSOFT,
    add_initializer,
    attribute_float,
    attribute_int,
    fixed_dim,
    insert,
    is_weight,
    last_axis_slice,
    lazy_tensor,
    only_consumer,
    producer,
    rank,
    remove_dead,
    scalar,
    typed,
)


@dataclass(slots=True)
class _Projection:
    """`MatMul(source, weight) (+ bias)` that feeds one attention input and nothing else."""

    source: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    width: int


class PackQKV(GraphPass):
    """Three MatMuls that share their input and feed one GroupQueryAttention → one MatMul and a packed query input.

    Fewer, larger products use the threads better at one token a step. Biases are concatenated (absent ones as zeros); a
    query scaled by a constant (OPT) hands that factor to the attention's scale. A projection that was packed in the model
    and split (GPT-2, Phi-3) is passed on unsplit. Projections with a norm or an unfused rotation in between stay apart.
    """

    name: ClassVar[str] = "pack_qkv"

    def apply(self, model: ir.Model) -> Changes:
        changes = Changes(self.name)
        for node in [n for n in model.graph if n.op_type == "GroupQueryAttention" and n.domain == MICROSOFT]:
            if node.inputs[1] is None:
                continue
            if _fold_scale(node):
                changes.add("query scales folded")
            if _unsplit(node):
                changes.add("splits removed")
            elif (found := _projections(node)) is not None:
                _pack(model.graph, node, found)
                changes.add("projections packed", 3)
        return changes


def _fold_scale(node: ir.Node) -> bool:
    query = node.inputs[0]
    multiply = producer(query, "Mul")
    if multiply is None or query is None or only_consumer(query) is not node:
        return False
    for value, other in ((multiply.inputs[0], multiply.inputs[1]), (multiply.inputs[1], multiply.inputs[0])):
        factor = scalar(other)
        if factor is not None and value is not None and (rank(other) or 0) <= 1:
            scale = attribute_float(node, "scale", 0.0)
            if scale == 0.0:
                return False
            node.attributes["scale"] = ir.AttrFloat32("scale", scale * factor)
            node.replace_input_with(0, value)
            assert isinstance(node.graph, ir.Graph)
            remove_dead(node.graph, multiply)
            return True
    return False


def _unsplit(node: ir.Node) -> bool:
    """A packed projection that was cut into query, key, value in this order (by Split or by Slices) → passed on whole."""
    parts = list(node.inputs[:3])
    if any(part is None or only_consumer(part) is not node for part in parts):
        return False
    makers = [part.producer() for part in parts if part is not None]
    split = producer(parts[0], "Split")
    cuts = [last_axis_slice(part) for part in parts]
    if split is not None and list(split.outputs) == parts and attribute_int(split, "axis", 0) in (-1, 2):
        packed = split.inputs[0]
    elif (first := cuts[0]) is not None and rank(first[0]) == 3 and all(cut is not None and cut[0] is first[0] for cut in cuts):
        bounds = [bound for cut in cuts if cut is not None for bound in cut[1:]]
        if bounds[0] != 0 or bounds[1] != bounds[2] or bounds[3] != bounds[4] or bounds[5] != fixed_dim(first[0], 2):
            return False
        packed = first[0]
    else:
        return False
    _set_packed(node, packed)
    assert isinstance(node.graph, ir.Graph)
    remove_dead(node.graph, *dict.fromkeys(maker for maker in makers if maker is not None))
    return True


def _projections(node: ir.Node) -> tuple[_Projection, _Projection, _Projection] | None:
    found = [_projection(node, value) for value in node.inputs[:3]]
    if any(one is None for one in found):
        return None
    query, key, value = (one for one in found if one is not None)
    if query.source is not key.source or key.source is not value.source:
        return None
    return query, key, value


def _projection(node: ir.Node, value: ir.Value | None) -> _Projection | None:
    bias: ir.Value | None = None
    if value is None or only_consumer(value) is not node:
        return None
    product = value
    if (add := producer(value, "Add")) is not None:
        stored = [v for v in add.inputs if v is not None and is_weight(v) and rank(v) == 1]
        computed = [v for v in add.inputs if v is not None and not is_weight(v)]
        if len(stored) != 1 or len(computed) != 1 or only_consumer(computed[0]) is not add:
            return None
        bias, product = stored[0], computed[0]
    matmul = producer(product, "MatMul")
    if matmul is None or matmul.inputs[0] is None or matmul.inputs[1] is None or not is_weight(matmul.inputs[1]):
        return None
    width = fixed_dim(matmul.inputs[1], 1)
    if rank(matmul.inputs[1]) != 2 or width is None or rank(matmul.inputs[0]) != 3:
        return None
    if bias is not None and fixed_dim(bias, 0) != width:
        return None
    return _Projection(matmul.inputs[0], matmul.inputs[1], bias, width)


def _pack(graph: ir.Graph, node: ir.Node, parts: Sequence[_Projection]) -> None:
    old = [value.producer() for value in node.inputs[:3] if value is not None]
    width = sum(part.width for part in parts)
    tensors = [part.weight.const_value for part in parts]
    depth = fixed_dim(parts[0].weight, 0)
    assert depth is not None and tensors[0] is not None and parts[0].source.shape is not None
    name = _packed_name(str(parts[0].weight.name))

    def concatenated() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return np.concatenate([np.asarray(tensor.numpy()) for tensor in tensors if tensor is not None], axis=1)

    weight = add_initializer(graph, name, lazy_tensor(name, tensors[0].dtype, (depth, width), concatenated))
    dims = [*parts[0].source.shape[:2], width]
    out = insert(node, "MatMul", [parts[0].source, weight], name=f"{node.name or name}.qkv").outputs[0]
    typed(out, parts[0].source.dtype, dims)
    if any(part.bias is not None for part in parts):
        values = [
            np.asarray(part.bias.const_value.numpy())
            if part.bias is not None and part.bias.const_value is not None
            else np.zeros(part.width, np.float32)
            for part in parts
        ]
        bias = add_initializer(graph, f"{name}.bias", np.concatenate(values))
        out = typed(insert(node, "Add", [out, bias]).outputs[0], parts[0].source.dtype, dims)
    _set_packed(node, out)
    remove_dead(graph, *[maker for maker in old if maker is not None])


def _packed_name(first: str) -> str:
    return first.replace("q_proj", "qkv_proj") if "q_proj" in first else f"{first}.qkv"


def _set_packed(node: ir.Node, packed: ir.Value | None) -> None:
    node.replace_input_with(0, packed)
    node.replace_input_with(1, None)
    node.replace_input_with(2, None)
