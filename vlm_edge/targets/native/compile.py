"""A lowered decoder (GroupQueryAttention on a shared cache) → the steps of a plan."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from vlm_edge.passes.attention_mask import BLOCK_IDS
from vlm_edge.passes.graph import (
    MICROSOFT,
    attribute_float,
    attribute_int,
    constant,
    consumers,
    fixed_dim,
    is_weight,
    only_consumer,
    producer,
    scalar,
)

from .attention import SOURCE_MASK, cross_attention, self_attention
from .builder import PAST, Context, Rows
from .errors import NotExpressible
from .panels import vector
from .patterns import Gated, activation, gated
from .plan_file import BufferKind, Kind, Plan, Ref, Unary, Value, Weight
from .products import Product, product, stacked

_PRESENT = "present."
_CROSS = "cross_key_values."
_GEOMETRY = ("Shape", "Size", "ConstantOfShape")


class Compiler:
    """One decoder's translation. `compile` may be called once."""

    def __init__(self, model: ir.Model, *, cache: ir.DataType = ir.DataType.FLOAT16) -> None:
        """`cache`: in what the keys and values are kept, float32 or float16, whatever the graph says."""
        self.graph = model.graph
        self.cache = cache
        self.context = Context(model)
        self.made = self.context.made
        self.inputs = self.context.inputs
        self.done: set[ir.Node] = set()

    def compile(self) -> Plan:
        """Raises NotExpressible with what has no step."""
        embeds, logits = self.inputs["inputs_embeds"], self._logits()
        hidden, vocab = fixed_dim(embeds, -1), fixed_dim(logits, -1)
        if hidden is None or vocab is None:
            raise NotExpressible("sizes that are not fixed")
        for name in self.context.further:
            if name not in (BLOCK_IDS, SOURCE_MASK) and not name.startswith(_CROSS):
                raise NotExpressible(f"an input '{name}'")
        start = self.made.floats(hidden)
        start.buffer.kind = BufferKind.EMBEDS
        self.made.define(embeds, start, hidden, False)
        nodes = list(self.graph)
        layers = self._gated_layers(nodes)
        for node in nodes:
            if node in layers:
                self._gated(layers[node])
            elif node not in self.done:
                self._node(node)
        self._write_logits(logits)
        positions = self.inputs.get("position_ids")
        axes = 0 if positions is None else 1 if positions.shape is None or len(positions.shape) == 2 else fixed_dim(positions, 0)
        return Plan(
            [self._value(value) for value in self.graph.inputs],
            [self._value(value) for value in self.graph.outputs],
            hidden,
            vocab,
            axes or 0,
            self.made.steps,
            self.context.further.index(BLOCK_IDS) if BLOCK_IDS in self.context.further else -1,
        )

    def _logits(self) -> ir.Value:
        found = None
        for value in self.graph.outputs:
            if value.name == "logits":
                found = value
            elif not str(value.name).startswith(_PRESENT):
                raise NotExpressible(f"an output '{value.name}'")
        if found is None:
            raise NotExpressible("a decoder without logits")
        return found

    def _write_logits(self, value: ir.Value) -> None:
        rows = self.made.rows(value)
        last = self.made.steps[-1]
        if not rows.last or last.outputs[:1] != [rows.ref] or rows.ref.column or rows.ref.buffer.width != rows.width:
            raise NotExpressible("logits that are not the last thing computed, or of all tokens")
        rows.ref.buffer.kind = BufferKind.LOGITS

    def _value(self, value: ir.Value) -> Value:
        dtype = value.dtype
        if dtype is None or value.shape is None:
            raise NotExpressible(f"'{value.name}' has no type or shape")
        if str(value.name).startswith((PAST, _PRESENT)):
            dtype = self.cache
        shape = tuple(size if isinstance(size, int) else str(size.value or "") for size in value.shape)
        return Value(str(value.name), int(dtype), shape)

    def _node(self, node: ir.Node) -> None:
        handlers: dict[tuple[str, str], Callable[[ir.Node], None]] = {
            (MICROSOFT, "MatMulNBits"): self._matmul,
            ("", "MatMul"): self._matmul,
            (MICROSOFT, "GroupQueryAttention"): lambda one: self_attention(self.context, one),
            (MICROSOFT, "MultiHeadAttention"): lambda one: cross_attention(self.context, one),
            (MICROSOFT, "SkipSimplifiedLayerNormalization"): self._skip_norm,
            (MICROSOFT, "SkipLayerNormalization"): self._skip_norm,
            ("", "RMSNormalization"): self._norm,
            ("", "LayerNormalization"): self._norm,
            ("", "Gather"): self._gather,
            ("", "Reshape"): self._reshape,
            ("", "Split"): self._split,
            ("", "Where"): self._select,
            ("", "RotaryEmbedding"): self._later,
            ("", "Add"): self._add,
            ("", "Mul"): self._multiply,
            ("", "Div"): self._divide,
            ("", "Tanh"): lambda one: self._unary(one, Unary.TANH, one.inputs[0]),
            ("", "Sigmoid"): lambda one: self._unary(one, Unary.SIGMOID, one.inputs[0]),
            ("", "Relu"): self._activation,
            ("", "Gelu"): self._activation,
            (MICROSOFT, "Gelu"): self._activation,
            (MICROSOFT, "FastGelu"): self._activation,
            (MICROSOFT, "QuickGelu"): self._activation,
        }
        handler = handlers.get((node.domain, node.op_type))
        computed = any(value in self.made.values for value in node.inputs)
        if node.op_type in _GEOMETRY or (not computed and (node.domain, node.op_type) != ("", "Gather")):
            return  # geometry: shapes, positions, tables; whoever needs it asks for it
        if handler is None:
            raise NotExpressible(f"{node.op_type}")
        handler(node)

    def _later(self, node: ir.Node) -> None:
        """What is taken in by a node that comes after it."""

    # --- matrix products ---

    def _gated_layers(self, nodes: list[ir.Node]) -> dict[ir.Node, tuple[Gated, Product]]:
        """Multiplications at the end of a gated layer whose two products can be one; their nodes count as done."""
        found: dict[ir.Node, tuple[Gated, Product]] = {}
        for node in nodes:
            layer = gated(node)
            both = self._two_products(layer) if layer is not None else None
            if layer is not None and both is not None:
                found[node] = layer, both
                self.done.update(layer.nodes)
                self.done.update(both.nodes)
        return found

    def _two_products(self, layer: Gated) -> Product | None:
        gate, up = (_product_node(one) for one in (layer.gate, layer.up))
        if gate is None or up is None:
            return None
        if gate is up and gate.op_type == "Split" and not gate.domain and len(gate.outputs) == 2:  # Phi-3 packs them
            whole = product(gate.inputs[0].producer()) if gate.inputs[0] is not None else None
            if whole is None or whole.width % 2 or only_consumer(gate.inputs[0]) is not gate:  # type: ignore[arg-type]
                return None
            half = whole.width // 2
            first = 0 if layer.gate is gate.outputs[0] else half
            return whole.paired(np.arange(first, first + half), np.arange(half - first, 2 * half - first), (gate,))
        left, right = product(gate), product(up)
        if left is None or right is None or left.source is not right.source or left.width != right.width:
            return None
        if left.out is not layer.gate or right.out is not layer.up:
            return None
        both = stacked([left, right])
        return both and both.paired(np.arange(left.width), np.arange(left.width, 2 * left.width), ())

    def _gated(self, found: tuple[Gated, Product]) -> None:
        layer, both = found
        rows = self.made.rows(both.source)
        out, width = layer.nodes[0].outputs[0], both.pairs
        ref = self.made.floats(width)
        weights = [both.weight(), both.bias_weight()]
        self.made.add(Kind.GATED, width, rows.last, [self._operand(rows, both)], [ref], weights, [int(layer.kind)])
        self.made.define(out, ref, width, rows.last)

    def _operand(self, rows: Rows, one: Product) -> Ref:
        return self.made.quantised(rows) if one.bits else rows.ref

    def _matmul(self, node: ir.Node) -> None:
        one = product(node)
        if one is None:
            raise NotExpressible(f"{node.op_type} of two computed matrices")
        rows = self.made.rows(one.source)
        out, kind = one.out, Unary.IDENTITY
        users = consumers(out)
        found = activation(self._activated(out, users))
        self.done.update(one.nodes)
        if found is not None and set(users) <= set(found.nodes) and not out.is_graph_output():
            out, kind = found.nodes[0].outputs[0], found.kind
            self.done.update(found.nodes)
        ref = self.made.floats(one.width)
        self.made.add(
            Kind.MATMUL, one.width, rows.last, [self._operand(rows, one)], [ref], [one.weight(), one.bias_weight()], [int(kind)]
        )
        self.made.define(out, ref, one.width, rows.last)

    def _activated(self, value: ir.Value, users: list[ir.Node]) -> ir.Value | None:
        """The value behind `value` that may be an activation of it: each of its readers, and what those lead to."""
        for _ in range(8):
            for user in users:
                found = activation(user.outputs[0])
                if found is not None and found.source is value:
                    return user.outputs[0]
            users = [one for user in users for one in consumers(user.outputs[0])]
        return None

    # --- norms and elementwise ---

    def _vector(self, value: ir.Value | None, size: int) -> Weight | None:
        if value is None:
            return None
        tensor = value.const_value if is_weight(value) else None
        if tensor is None or tensor.size not in (size, 1):
            raise NotExpressible(f"'{value.name}' is not a stored vector of {size}")
        if value not in self.context.vectors:
            self.context.vectors[value] = vector(np.broadcast_to(np.asarray(tensor.numpy(), np.float32).reshape(-1), (size,)))
        return self.context.vectors[value]

    def _codes_wanted(self, value: ir.Value) -> bool:
        return any(user.op_type == "MatMulNBits" for user in consumers(value))

    def _norm(self, node: ir.Node) -> None:
        rows, (out, size) = self.made.rows(node.inputs[0]), (node.outputs[0], fixed_dim(node.inputs[1], -1))
        axis, inputs = attribute_int(node, "axis", -1), [*node.inputs, None]
        dims = len(out.shape) if out.shape is not None else 3
        if size is None or rows.width % size or axis not in (-1, dims - 1) or any(one.uses() for one in node.outputs[1:]):
            raise NotExpressible(f"{node.op_type} over other than the last axis")
        ref = self.made.floats(rows.width)
        codes = self._codes_ref(out, ref, rows.width) if size == rows.width else None
        layer = int(node.op_type == "LayerNormalization")
        weights = [self._vector(node.inputs[1], size), self._vector(inputs[2], size)]
        arguments, reals = [layer, rows.width // size], [attribute_float(node, "epsilon", 1e-5)]
        self.made.add(Kind.NORM, rows.width, rows.last, [rows.ref], [ref, None, codes], weights, arguments, reals)
        self.made.define(out, ref, rows.width, rows.last)

    def _codes_ref(self, value: ir.Value, ref: Ref, width: int) -> Ref | None:
        if not self._codes_wanted(value):
            return None
        codes = self.made.floats(width)
        codes.buffer.kind = BufferKind.CODES
        self.made.codes[ref] = codes
        return codes

    def _skip_norm(self, node: ir.Node) -> None:
        simplified = node.op_type == "SkipSimplifiedLayerNormalization"
        left, right = self.made.rows(node.inputs[0]), self._operand_rows(node.inputs[1])
        inputs = [*node.inputs, *[None] * 3]
        beta, bias = (None, inputs[3]) if simplified else (inputs[3], inputs[4])
        width = left.width
        if right is None or right.width != width or right.last != left.last:
            raise NotExpressible(f"{node.op_type} of unlike rows")
        total, ref = self.made.floats(width), self.made.floats(width)
        codes = self._codes_ref(node.outputs[0], ref, width)
        weights = [self._vector(node.inputs[2], width), self._vector(beta, width), self._vector(bias, width)]
        reals = [attribute_float(node, "epsilon", 1e-12)]
        self.made.add(
            Kind.NORM, width, left.last, [left.ref, right.ref], [ref, total, codes], weights, [int(not simplified), 1], reals
        )
        self.made.define(node.outputs[0], ref, width, left.last)
        if len(node.outputs) > 3:
            self.made.define(node.outputs[3], total, width, left.last)

    def _operand_rows(self, value: ir.Value | None) -> Rows | None:
        return self.made.values.get(value) if value is not None else None

    def _activation(self, node: ir.Node) -> None:
        found = activation(node.outputs[0])
        if found is None:
            raise NotExpressible(f"{node.op_type} of an unknown kind")
        self._unary(node, found.kind, found.source)

    def _unary(self, node: ir.Node, kind: Unary, source: ir.Value | None, before: float = 1.0, after: float = 1.0) -> None:
        rows = self.made.rows(source)
        ref = self.made.floats(rows.width)
        self.made.add(Kind.UNARY, rows.width, rows.last, [rows.ref], [ref], [], [int(kind)], [before, after])
        self.made.define(node.outputs[0], ref, rows.width, rows.last)

    def _add(self, node: ir.Node) -> None:
        self._binary(node, Kind.ADD)

    def _multiply(self, node: ir.Node) -> None:
        found = activation(node.outputs[0])
        if found is not None and found.source in self.made.values:
            self._unary(node, found.kind, found.source)
            return
        for x, given in (node.inputs, node.inputs[::-1]):
            factor = scalar(given)
            if factor is not None:
                self._unary(node, Unary.IDENTITY, x, factor)
                return
        self._binary(node, Kind.MULTIPLY)

    def _divide(self, node: ir.Node) -> None:
        divisor = scalar(node.inputs[1])
        if not divisor:
            raise NotExpressible("a division by what is not a constant")
        self._unary(node, Unary.IDENTITY, node.inputs[0], 1.0 / divisor)

    def _binary(self, node: ir.Node, kind: Kind) -> None:
        left, right = (self._operand_rows(value) for value in node.inputs)
        first = left or right
        if first is None:
            raise NotExpressible(f"{node.op_type} of nothing computed")
        ref = self.made.floats(first.width)
        if left is not None and right is not None:
            if (left.width, left.last) != (right.width, right.last):
                raise NotExpressible(f"{node.op_type} of unlike rows")
            self.made.add(kind, left.width, left.last, [left.ref, right.ref], [ref])
        else:
            other = node.inputs[1] if left is not None else node.inputs[0]
            self.made.add(kind, first.width, first.last, [first.ref], [ref], [self._vector(other, first.width)])
        self.made.define(node.outputs[0], ref, first.width, first.last)

    # --- shapes, tables ---

    def _reshape(self, node: ir.Node) -> None:
        rows, shape = self.made.rows(node.inputs[0]), node.outputs[0].shape
        fixed = [size for size in shape if isinstance(size, int)] if shape is not None else []
        if shape is None or len(fixed) != len(shape) - 2 or int(np.prod(fixed)) != rows.width:
            raise NotExpressible("a Reshape that mixes tokens")
        self.made.define(node.outputs[0], rows.ref, rows.width, rows.last)

    def _split(self, node: ir.Node) -> None:
        rows, column = self.made.rows(node.inputs[0]), 0
        dims = len(node.outputs[0].shape) if node.outputs[0].shape is not None else 3
        if attribute_int(node, "axis", 0) not in (-1, dims - 1):
            raise NotExpressible("a Split of tokens")
        for out in node.outputs:
            width = fixed_dim(out, -1)
            if width is None:
                raise NotExpressible("a Split of unknown sizes")
            self.made.define(out, Ref(rows.ref.buffer, rows.ref.column + column), width, rows.last)
            column += width

    def _gather(self, node: ir.Node) -> None:
        source, indices = node.inputs[0], node.inputs[1]
        if source in self.made.values:
            rows, index = self.made.rows(source), constant(indices)
            if index is None or index.size != 1 or int(index.reshape(-1)[0]) != -1 or attribute_int(node, "axis", 0) != 1:
                raise NotExpressible("a Gather of tokens other than the last")
            ref = self.made.floats(rows.width)
            self.made.add(Kind.LAST, rows.width, True, [rows.ref], [ref])
            self.made.define(node.outputs[0], ref, rows.width, True)
            return
        shift = self._position_shift(indices)
        if shift is None or not is_weight(source) or source is None or attribute_int(node, "axis", 0) != 0:
            return  # geometry
        tensor = source.const_value
        if tensor is None or len(tensor.shape) != 2 or source.dtype != ir.DataType.FLOAT:
            return
        table = vector(np.asarray(tensor.numpy(), np.float32))
        ref = self.made.floats(table.width)
        self.made.add(Kind.LOOKUP, table.width, False, [], [ref], [table], [shift, 0])
        self.made.define(node.outputs[0], ref, table.width, False)

    def _position_shift(self, value: ir.Value | None) -> int | None:
        """n where `value` = position_ids + n."""
        if value is not None and value is self.inputs.get("position_ids"):
            return 0
        node = producer(value, "Add")
        if node is not None:
            for position, given in (node.inputs, node.inputs[::-1]):
                found = scalar(given)
                if position is self.inputs.get("position_ids") and found is not None:
                    return int(found)
        return None

    def _select(self, node: ir.Node) -> None:
        """Rows of one kind for tokens inside a block (a picture's), of another for the rest."""
        test = node.inputs[0]
        while test is not None and (found := producer(test, "Unsqueeze", "Cast")) is not None:
            test = found.inputs[0]
        inside = producer(test, "Greater")
        if inside is None or inside.inputs[0] is not self.inputs.get(BLOCK_IDS) or scalar(inside.inputs[1]) != 0:
            raise NotExpressible("a Where whose condition is not block_ids > 0")
        left, right = self.made.rows(node.inputs[1]), self.made.rows(node.inputs[2])
        if (left.width, left.last) != (right.width, right.last) or left.last:
            raise NotExpressible("a Where of unlike rows")
        ref = self.made.floats(left.width)
        self.made.add(Kind.SELECT, left.width, False, [left.ref, right.ref], [ref])
        self.made.define(node.outputs[0], ref, left.width, False)


def _product_node(value: ir.Value) -> ir.Node | None:
    """The node behind a value that a product may be: itself, or the product that a bias is added to."""
    node = value.producer()
    if node is not None and node.op_type == "Add" and not node.domain:
        return next((found for one in node.inputs if (found := producer(one, "MatMul")) is not None), node)
    return node
