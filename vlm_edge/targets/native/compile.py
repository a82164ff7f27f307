"""A lowered decoder (GroupQueryAttention on a shared cache) → the steps of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from vlm_edge.passes.attention_mask import BLOCK_IDS
from vlm_edge.passes.graph import MICROSOFT, consumers, fixed_dim, only_consumer, producer

from .attention import cross_attention, self_attention, static_attention
from .builder import PAST, SCALE, Context, Rows
from .errors import NotExpressible
from .head import split
from .layout import Layout
from .panels import BLOCK
from .patterns import Gated, activation, gated
from .plan_file import Buffer, BufferKind, Kind, Plan, Ref, Unary, Value
from .products import Product, product, stacked
from .rowwise import RowWise
from .token_masks import SOURCE_MASK, TOKEN_MASK

_PRESENT = "present."
_CROSS = "cross_key_values."
_GEOMETRY = ("Shape", "Size", "ConstantOfShape")
_ANY_LAYOUT = ("Transpose", "RMSNormalization", "LayerNormalization", "Attention", "RotaryEmbedding")
"""What works on rows by head, [batch, heads, sequence, size], as on others."""


class Compiler:
    """One decoder's translation. `compile` may be called once."""

    def __init__(self, model: ir.Model, *, cache: ir.DataType = ir.DataType.FLOAT16) -> None:
        """`cache`: in what the keys and values are kept, float32, float16 or int8, whatever the graph says."""
        self.graph = model.graph
        self.cache = cache
        self.context = Context(model, codes=cache == ir.DataType.INT8)
        self.made = self.context.made
        self.inputs = self.context.inputs
        self.rowwise = RowWise(self.context)
        self.layout = Layout(self.context, self.rowwise)
        self.places: dict[ir.Value, Ref] = {}
        self.done: set[ir.Node] = set()

    def compile(self) -> Plan:
        """Raises NotExpressible with what has no step."""
        embeds, logits = self.inputs["inputs_embeds"], self._logits()
        hidden, vocab = fixed_dim(embeds, -1), fixed_dim(logits, -1)
        if hidden is None or vocab is None:
            raise NotExpressible("sizes that are not fixed")
        for name in self.context.further:
            if name not in (BLOCK_IDS, SOURCE_MASK, TOKEN_MASK) and not name.startswith(_CROSS):
                self._given(name)
        start = self.made.floats(hidden)
        start.buffer.kind = BufferKind.EMBEDS
        self.made.define(embeds, start, hidden, False)
        nodes = list(self.graph)
        layers = self._gated_layers(nodes)
        self._side_by_side(nodes)
        for node in nodes:
            if node in layers:
                self._gated(layers[node])
            elif node not in self.done:
                self._node(node)
        self._write_logits(logits)
        positions = self.inputs.get("position_ids")
        axes = 0 if positions is None else 1 if positions.shape is None or len(positions.shape) == 2 else fixed_dim(positions, 0)
        return Plan(
            [*(self._value(value) for value in self.graph.inputs), *self._scales(self.graph.inputs, PAST)],
            [*(self._value(value) for value in self.graph.outputs), *self._scales(self.graph.outputs, _PRESENT)],
            hidden,
            vocab,
            axes or 0,
            self.made.steps,
            self.context.further.index(BLOCK_IDS) if BLOCK_IDS in self.context.further else -1,
        )

    def _given(self, name: str) -> None:
        """Rows that the host gives besides the embeddings (DeepStack's features, which are added between layers)."""
        value = self.inputs[name]
        sizes = list(value.shape) if value.shape is not None else []
        if value.dtype != ir.DataType.FLOAT or [str(size) for size in sizes[:2]] != ["batch", "sequence"] or len(sizes) != 3:
            raise NotExpressible(f"an input '{name}'")
        width = fixed_dim(value, -1)
        if width is None:
            raise NotExpressible(f"an input '{name}' of unknown width")
        place = Buffer(BufferKind.INPUT, width, self.context.further.index(name))
        self.made.define(value, Ref(place), width, False)

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
        buffer = rows.ref.buffer
        if not rows.last or rows.ref.column or buffer.width != rows.width or buffer.kind != BufferKind.FLOATS:
            raise NotExpressible("logits that are not computed of the last token alone")
        buffer.kind = BufferKind.LOGITS
        writers = [step for step in self.made.steps if any(ref and ref.buffer is buffer for ref in step.outputs)]
        if writers:  # several where further tokens have a table of their own: the largest is worth it
            split(self.made, max(writers, key=lambda step: step.width))

    def _value(self, value: ir.Value) -> Value:
        dtype = value.dtype
        if dtype is None or value.shape is None:
            raise NotExpressible(f"'{value.name}' has no type or shape")
        if str(value.name).startswith((PAST, _PRESENT)):
            dtype = self.cache
        shape = tuple(size if isinstance(size, int) else str(size.value or "") for size in value.shape)
        return Value(str(value.name), int(dtype), shape)

    def _scales(self, values: Sequence[ir.Value], prefix: str) -> Iterator[Value]:
        """The scales of caches in 8 bits, [batch, heads · blocks, capacity, 1], named after them."""
        for value in values if self.context.codes else ():
            if str(value.name).startswith(prefix):
                batch, heads, capacity, size = self._value(value).shape
                if not isinstance(heads, int) or not isinstance(size, int):
                    raise NotExpressible(f"'{value.name}' has no fixed heads")
                shape = (batch, heads * -(-size // BLOCK), capacity, 1)
                yield Value(f"{value.name}{SCALE}", int(ir.DataType.FLOAT16), shape)

    def _node(self, node: ir.Node) -> None:
        rowwise, layout = self.rowwise, self.layout
        handlers: dict[tuple[str, str], Callable[[ir.Node], None]] = {
            (MICROSOFT, "MatMulNBits"): self._matmul,
            ("", "MatMul"): self._matmul,
            (MICROSOFT, "GroupQueryAttention"): lambda one: self_attention(self.context, one),
            (MICROSOFT, "MultiHeadAttention"): lambda one: cross_attention(self.context, one),
            ("", "Attention"): lambda one: static_attention(self.context, one),
            (MICROSOFT, "SkipSimplifiedLayerNormalization"): rowwise.skip_norm,
            (MICROSOFT, "SkipLayerNormalization"): rowwise.skip_norm,
            ("", "RMSNormalization"): rowwise.norm,
            ("", "LayerNormalization"): rowwise.norm,
            ("", "Gather"): layout.gather,
            ("", "Reshape"): layout.reshape,
            ("", "Transpose"): layout.transpose,
            ("", "Split"): layout.split,
            ("", "Where"): layout.where,
            ("", "Concat"): self._concat,
            ("", "RotaryEmbedding"): self._later,
            ("", "Add"): rowwise.add,
            ("", "Sub"): rowwise.subtract,
            ("", "Mul"): rowwise.multiply,
            ("", "Div"): rowwise.divide,
            ("", "Greater"): rowwise.greater,
            ("", "Cast"): rowwise.cast,
            ("", "Tanh"): lambda one: rowwise.unary(one, Unary.TANH, one.inputs[0]),
            ("", "Sigmoid"): lambda one: rowwise.unary(one, Unary.SIGMOID, one.inputs[0]),
            ("", "Relu"): rowwise.activation,
            ("", "Gelu"): rowwise.activation,
            (MICROSOFT, "Gelu"): rowwise.activation,
            (MICROSOFT, "FastGelu"): rowwise.activation,
            (MICROSOFT, "QuickGelu"): rowwise.activation,
        }
        handler = handlers.get((node.domain, node.op_type))
        computed = any(value in self.made.values for value in node.inputs)
        if node.op_type in _GEOMETRY or (not computed and (node.domain, node.op_type) != ("", "Gather")):
            return  # geometry: shapes, positions, tables; whoever needs it asks for it
        if handler is None:
            raise NotExpressible(f"{node.op_type}")
        by_head = any(value in self.context.by_head for value in node.inputs)
        if by_head and node.op_type not in _ANY_LAYOUT:
            raise NotExpressible(f"{node.op_type} of heads before tokens")
        handler(node)
        if by_head and node.op_type in ("RMSNormalization", "LayerNormalization"):
            self.context.by_head.add(node.outputs[0])

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
        ref = self.places.get(out) or self.made.floats(one.width)
        self.made.add(
            Kind.MATMUL, one.width, rows.last, [self._operand(rows, one)], [ref], [one.weight(), one.bias_weight()], [int(kind)]
        )
        self.made.define(out, ref, one.width, rows.last)

    def _side_by_side(self, nodes: list[ir.Node]) -> None:
        """Products that are joined into one row are written there."""
        for node in nodes:
            if node.op_type != "Concat" or node.domain or any(value is None for value in node.inputs):
                continue
            parts = [_product_node(value) for value in node.inputs if value is not None]
            widths = [fixed_dim(value, -1) for value in node.inputs]
            if any(one is None or one.op_type not in ("MatMul", "MatMulNBits") for one in parts) or not all(widths):
                continue
            buffer, column = Buffer(BufferKind.FLOATS, sum(width or 0 for width in widths)), 0
            for value, width in zip(node.inputs, widths, strict=True):
                if value is not None and only_consumer(value) is node:
                    self.places[value] = Ref(buffer, column)
                column += width or 0

    def _concat(self, node: ir.Node) -> None:
        rows = [self.made.rows(value) for value in node.inputs]
        buffer, column = rows[0].ref.buffer, 0
        for one in rows:
            if (one.ref.buffer, one.ref.column, one.last) != (buffer, column, rows[0].last):
                raise NotExpressible("a Concat of other than products")
            column += one.width
        self.made.define(node.outputs[0], Ref(buffer), column, rows[0].last)

    def _activated(self, value: ir.Value, users: list[ir.Node]) -> ir.Value | None:
        """The value behind `value` that may be an activation of it: each of its readers, and what those lead to."""
        for _ in range(8):
            for user in users:
                found = activation(user.outputs[0])
                if found is not None and found.source is value:
                    return user.outputs[0]
            users = [one for user in users for one in consumers(user.outputs[0])]
        return None


def _product_node(value: ir.Value) -> ir.Node | None:
    """The node behind a value that a product may be: itself, or the product that a bias is added to."""
    node = value.producer()
    if node is not None and node.op_type == "Add" and not node.domain:
        return next((found for one in node.inputs if (found := producer(one, "MatMul")) is not None), node)
    return node
