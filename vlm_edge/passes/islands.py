"""Which nodes of a half-precision graph compute in fp32: found by operator and by the neighbours of normalisations."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from .dtypes import inner_graphs
from .graph import consumers, is_weight, only_consumer, producer, scalar

Half = Literal["fp16", "bf16"]
PRECISION = "vlm_edge.precision"
"""Metadata of a node that must compute in fp32 (`"fp32"`), whatever the islands; a pass that decomposes a normalisation,

a softmax or a rotation may set it on what it writes.
"""
NORMS = frozenset(
    {
        "LayerNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "LpNormalization",
        "MeanVarianceNormalization",
    }
)
_OF_NORMS = frozenset({"Pow", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Sqrt", "Reciprocal"})
"""What a decomposed normalisation is made of; sums and squares are also what leaves fp16's range first."""
_ROOTS = frozenset({"Sqrt", "Reciprocal", "ReduceL2"})
_SOFTMAX = frozenset({"Softmax", "LogSoftmax", "Exp", "Log", "ReduceLogSumExp"})
_BEFORE_SOFTMAX = frozenset({"Add", "Sub", "Mul", "Div", "Where", "Tanh", "Clip", "Max", "Min"})
"""What may stand between a product of queries and keys and its softmax: scale, soft-cap, bias, mask."""
_AFTER_PRODUCT = _BEFORE_SOFTMAX | {"Gather", "Squeeze", "Slice", "Reshape", "Identity"}
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
_SMALL_WEIGHT = 4096


@dataclass(slots=True, frozen=True)
class Islands:
    """What stays in fp32 in a half-precision graph besides positions, masks, overflowing weights and fp32 outputs."""

    norms: bool = True
    softmax: bool = True
    """Of decomposed attention and of softmax nodes; a whole `Attention` node is never taken apart."""
    nodes: frozenset[str] = frozenset()
    """Further nodes by name."""

    def __str__(self) -> str:
        words = [word for word, on in (("norms", self.norms), ("softmax", self.softmax)) if on]
        return ", ".join([*words, *sorted(self.nodes)]) or "none"


def island_nodes(graph: ir.Graph, islands: Islands, full_outputs: Collection[str]) -> set[ir.Node]:
    """The nodes that compute in fp32 by choice: islands, marked nodes, and what lies between a product and an fp32 output."""
    found = {node for node in graph if node.metadata_props.get(PRECISION) == "fp32" or (node.name or "") in islands.nodes}
    if islands.norms:
        found |= set(_norms(graph))
    if islands.softmax:
        found |= set(_softmaxes(graph))
    for value in graph.outputs:
        if value.name in full_outputs and value.dtype == ir.DataType.FLOAT:
            found |= set(_last(value))
    return found


def _norms(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        if node.domain:
            continue
        if node.op_type in NORMS:
            yield node
        elif node.op_type in _OF_NORMS:
            yield node
            yield from _squared(node)
            if node.op_type in _ROOTS:
                yield from _roots(node)


def _squared(node: ir.Node) -> Iterator[ir.Node]:
    """x − mean(x), x · x and the epsilon ahead of a node of a decomposed normalisation."""
    for value in node.inputs:
        maker = producer(value, "Sub", "Mul", "Add")
        if maker is None or any(user.op_type not in _OF_NORMS | {"Div", "Mul"} for user in consumers(maker.outputs[0])):
            continue
        square = maker.op_type == "Mul" and maker.inputs[0] is maker.inputs[1]
        mean = maker.op_type == "Sub" and producer(maker.inputs[1], "ReduceMean") is not None
        if square or mean or (maker.op_type == "Add" and any(scalar(given) is not None for given in maker.inputs)):
            yield maker


def _roots(node: ir.Node) -> Iterator[ir.Node]:
    """What divides by a root: Div and Mul right after it, with at most a Clip, Max, Add or another root between."""
    todo, seen = [node], {node}
    while todo:
        for user in consumers(todo.pop().outputs[0]):
            if user in seen or user.domain:
                continue
            seen.add(user)
            if user.op_type in ("Clip", "Max", "Add", "Reciprocal", "Expand") or (
                user.op_type == "Div" and scalar(user.inputs[0]) is not None
            ):
                yield user
                todo.append(user)
            elif user.op_type in ("Div", "Mul"):
                yield user


def _softmaxes(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        if node.domain or node.op_type not in _SOFTMAX:
            continue
        yield node
        todo = [node]
        while todo:
            for value in todo.pop().inputs:
                before = producer(value, *_BEFORE_SOFTMAX)
                if value is not None and before is not None and only_consumer(value) is not None:
                    yield before
                    todo.append(before)


def _last(value: ir.Value) -> Iterator[ir.Node]:
    """Elementwise nodes behind an fp32 output, back to the product that feeds them."""
    todo, seen = [value.producer()], set[ir.Node]()
    while todo:
        node = todo.pop()
        if node is None or node in seen or node.domain or node.op_type not in _AFTER_PRODUCT:
            continue
        seen.add(node)
        if all(user in seen or out is value for out in node.outputs for user in consumers(out)):
            yield node
            todo += [given.producer() for given in node.inputs if given is not None]


def exact_values(graph: ir.Graph) -> set[ir.Value]:
    """Float values that come from whole numbers, shapes and small constants alone: positions, rotary tables, masks.

    fp16 counts to 2,048 only. What looks up a stored table or goes through a large product is data, whatever its index.
    """
    found: set[ir.Value] = set()
    for node in graph:
        read = [value for value in (*node.inputs, *_captured(node)) if value is not None and is_float(value)]
        weights = [value for value in read if is_weight(value)]
        computed = [value for value in read if not is_weight(value)]
        if any(value not in found for value in computed):
            continue
        if weights and not computed and (node.op_type not in ("Where", "If") or _large(weights)):  # a table that is looked up
            continue
        if node.op_type in _PRODUCTS and _large(weights):
            continue
        found |= {out for out in node.outputs if is_float(out)}
    return found


def _captured(node: ir.Node) -> list[ir.Value]:
    """What the subgraphs of a node read from outside of them."""
    found: list[ir.Value] = []
    for branch in inner_graphs(node):
        for inner in branch:
            found += [value for value in inner.inputs if value is not None and value.graph is not branch]
            found += _captured(inner)
    return found


def _large(weights: Collection[ir.Value | None]) -> bool:
    return any(w is not None and w.const_value is not None and w.const_value.size > _SMALL_WEIGHT for w in weights)


def is_float(value: ir.Value | None) -> bool:
    """Whether a value is fp32: what strong typing decides about."""
    return value is not None and value.dtype == ir.DataType.FLOAT


def largest(weight: ir.Value) -> float:
    """The largest magnitude of a stored tensor; infinity where it is infinite, NaN where it holds NaN."""
    assert weight.const_value is not None
    array = np.asarray(weight.const_value.numpy())
    return max(abs(float(array.max())), abs(float(array.min()))) if array.size else 0.0
