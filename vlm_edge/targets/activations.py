"""How much memory the values inside a graph take while it runs: an upper estimate, from shapes and liveness alone.

The graph is walked in its order with every input at its largest size. A value lives from the node that makes it to the last one
that reads it; what only depends on stored weights is no activation (it is folded when the engine is built, or fused into the
product that reads it), and views share what they look at. Nothing is taken to be fused or computed in place, which a compiler
does: so it is an upper estimate of the values, to which a kernel's own workspace comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx.shape_inference import infer_shapes

_VIEWS = frozenset({"Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
_SHAPES = 4096
"""Stored integers up to this many elements may be shapes, and are followed by value."""
CACHE = ("past_key_values.", "present.")
"""Inputs and outputs that are the KV cache, which is counted by itself."""


@dataclass(slots=True, frozen=True)
class Peak:
    """What a run needs at once. `bytes`: inputs, outputs and inner values; `node`: where they are most. `scores`: the attention

    scores of the largest `Attention`, which exist only where no fused kernel does it. `guessed`: values whose size is not known
    before the graph runs; each counts as the largest value its node reads.
    """

    bytes: int
    node: str
    scores: int
    guessed: int


def peak_activations(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> Peak:
    """The memory that one run needs beside weights and KV cache. `shapes`: inputs with dynamic dimensions → the largest."""
    sizes = _Sizes(model, shapes)
    order = list(model.graph)
    last: dict[ir.Value, int] = {}
    roots: dict[ir.Value, ir.Value] = {}
    for step, node in enumerate(order):
        for value in _reads(node):
            last[roots.get(value, value)] = step
        source = node.inputs[0] if node.inputs else None
        if node.op_type in _VIEWS and not node.domain and source is not None and not sizes.is_constant(source):
            roots[node.outputs[0]] = roots.get(source, source)
    kept = {roots.get(value, value) for value in (*model.graph.inputs, *model.graph.outputs) if not _is_cache(value)}
    alive = sum(sizes.bytes(value) for value in model.graph.inputs if not _is_cache(value))
    alive += sum(sizes.bytes(roots.get(value, value)) for value in model.graph.outputs if not _is_cache(value))
    most, where, scores = alive, "", 0
    for step, node in enumerate(order):
        if sizes.is_constant_node(node):
            continue
        made = [value for value in node.outputs if value not in roots and value not in kept and not _is_cache(value)]
        alive += sum(sizes.bytes(value) for value in made)
        if alive > most:
            most, where = alive, node.name or str(node.outputs[0].name)
        scores = max(scores, _scores(node, sizes))
        done = {roots.get(value, value) for value in (*_reads(node), *made)}
        alive -= sum(sizes.bytes(value) for value in done if last.get(value, step) == step and sizes.is_inner(value, kept))
    return Peak(bytes=most, node=where, scores=scores, guessed=sizes.guessed)


class _Sizes:
    """Sizes of all values of a graph, with its inputs at given shapes."""

    def __init__(self, model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> None:
        self._graph = model.graph
        self._named: dict[str, int] = {}
        for value in model.graph.inputs:
            for dim, size in zip(value.shape or (), shapes.get(str(value.name), ()), strict=False):
                if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                    self._named[dim.value] = max(size, self._named.get(dim.value, 0))
        self._shapes = _inferred(model, shapes)
        self._bytes: dict[ir.Value, int] = {}
        self._constants: set[ir.Node] = set()
        for node in model.graph:
            read = _reads(node)
            if node.op_type == "Constant" or (read and all(map(self.is_constant, read))):
                self._constants.add(node)
        self.guessed = 0

    def is_constant(self, value: ir.Value) -> bool:
        """Whether a value depends on nothing but stored weights."""
        if value.is_graph_input():
            return False
        maker = value.producer()
        return value.const_value is not None if maker is None else maker in self._constants

    def is_constant_node(self, node: ir.Node) -> bool:
        """Whether all that a node makes is constant."""
        return node in self._constants

    def is_inner(self, value: ir.Value, kept: set[ir.Value]) -> bool:
        """Whether a value's memory is free again after its last reader."""
        return value not in kept and not value.is_graph_input() and not _is_cache(value) and not self.is_constant(value)

    def shape(self, value: ir.Value) -> tuple[int, ...] | None:
        """The shape in numbers where it can be known."""
        found = self._shapes.get(str(value.name))
        if found is not None:
            return found
        dims: list[int] = []
        for dim in value.shape if value.shape is not None else (None,):
            size = self._named.get(str(dim.value)) if isinstance(dim, ir.SymbolicDim) else dim
            if size is None:
                return None
            dims.append(size)
        return tuple(dims)

    def bytes(self, value: ir.Value) -> int:
        """Bytes of a value; where its size is unknown, those of the largest value that its node reads."""
        if value in self._bytes:
            return self._bytes[value]
        self._bytes[value] = 0  # a value that depends on itself, in a loop's body
        shape = self.shape(value)
        if shape is not None:
            self._bytes[value] = math.ceil(math.prod(shape) * (value.dtype.itemsize if value.dtype is not None else 4))
        else:
            self.guessed += 1
            maker = value.producer()
            read = [one for one in _reads(maker) if not self.is_constant(one)] if maker is not None else []
            self._bytes[value] = max((self.bytes(one) for one in read), default=0)
        return self._bytes[value]


def _inferred(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Shapes by ONNX's own inference over the graph without its weights, inputs at their given sizes."""
    graph = onnx.GraphProto(name="sizes")
    for value in model.graph.inputs:
        own = [dim if isinstance(dim, int) else None for dim in value.shape or ()]
        graph.input.append(_typed(value, shapes.get(str(value.name), own)))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or value.is_graph_input():
            continue
        if tensor.dtype.is_integer() and tensor.size <= _SHAPES and tensor.dtype.bitwidth >= 8:
            graph.initializer.append(ir.serde.serialize_tensor(tensor))
            graph.initializer[-1].name = str(value.name)
        else:
            graph.input.append(_typed(value, [int(size) for size in tensor.shape.numpy()]))
    graph.node.extend(ir.serde.serialize_node(node) for node in model.graph)
    graph.output.extend(onnx.ValueInfoProto(name=str(value.name)) for value in model.graph.outputs)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.graph.opset_imports.items()]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)
    found: dict[str, tuple[int, ...]] = {}
    inferred = infer_shapes(proto, data_prop=True).graph
    for info in (*inferred.input, *inferred.value_info, *inferred.output):
        if not info.type.tensor_type.HasField("shape"):
            continue
        dims = info.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            found[info.name] = tuple(dim.dim_value for dim in dims)
    return found


def _typed(value: ir.Value, shape: Sequence[int | None]) -> onnx.ValueInfoProto:
    tensor = value.const_value
    dtype = value.dtype if value.dtype is not None else tensor.dtype if tensor is not None else ir.DataType.FLOAT
    return onnx.helper.make_tensor_value_info(str(value.name), int(dtype), list(shape))


def _scores(node: ir.Node, sizes: _Sizes) -> int:
    """Bytes of [batch, heads, queries, keys] of an Attention."""
    if node.op_type != "Attention" or node.domain or node.inputs[0] is None or node.inputs[1] is None:
        return 0
    query, key = sizes.shape(node.inputs[0]), sizes.shape(node.inputs[1])
    if query is None or key is None or len(query) not in (3, 4):
        return 0
    heads = query[1] if len(query) == 4 else node.attributes["q_num_heads"].as_int()
    width = node.inputs[0].dtype.itemsize if node.inputs[0].dtype is not None else 4
    return math.ceil(query[0] * heads * query[-2] * key[-2] * width)


def _reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads, branches and loop bodies included."""
    values = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            body = attribute.as_graph()
            inner = set(body.all_nodes())
            own = {*body.inputs, *body.initializers.values()}
            values += [
                value
                for one in inner
                for value in one.inputs
                if value is not None and value not in own and value.producer() not in inner
            ]
    return list(dict.fromkeys(values))


def _is_cache(value: ir.Value) -> bool:
    return str(value.name).startswith(CACHE)
