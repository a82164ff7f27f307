"""A lowered graph over images or texts (vision encoder, projector, resampler, text encoder) → the steps of a plan.

The graph is followed for one image, of one length where that is open: shapes are then numbers, whatever depends on nothing
computed is a constant, and what only moves numbers is worked out here. Images must not know of each other; the comparison after a
build, with two of them, shows it. Where the first dimension counts rows of one picture, so many of them as belong together stand
for an image (`encoder_patches`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.graph import MICROSOFT, attribute_int, consumers, is_weight, only_consumer

from .encoder_attention import Pending, attention, einsum, pending, scored
from .encoder_lengths import for_any_length, open_size
from .encoder_patches import ROWS, Regrouped, convert, cosine, handled, negate, patches, reduce_sum, row_input
from .encoder_products import Linear, activated, alike, linear, stacked
from .encoder_rows import activate, average_pool, binary, divide, multiply, norm, skip_norm, unary
from .encoder_texts import Sight, counted, integer_input
from .encoder_views import Array, Known, Sources, View, folded, moved
from .errors import NotExpressible
from .panels import integers, vector
from .plan_file import Buffer, BufferKind, GraphKind, Plan, Ref, Step, Unary, Value, Weight

IMAGES = ("batch", "images", "tiles", "frames", "texts", "rows", "videos", "clips", "states")
"""What the first dimension of inputs is called where it counts things that know nothing of each other."""
_SKIP_NORMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_DEEPEST = 1 << 16
"""Inputs of a product in bytes, whose sums are int32."""


class EncoderCompiler:
    """One graph's translation. `compile` may be called once."""

    def __init__(
        self, model: ir.Model, *, integer: bool = False, keep_first: int = 0, keep_last: int = 0, length: int | None = None
    ) -> None:
        """`integer`: products compute in 8 bits, weights per output and activations per row, but the first and last so many.

        `length`: what a size that is open, beside the first, is; None: any, where there is one.
        """
        self.model, self.graph, self.length = model, model.graph, length
        self.opsets = dict(model.graph.opset_imports)
        self.integer = integer
        self.kept = (keep_first, keep_last)
        self.joined = any(self.shape(value)[0] in ROWS for value in model.graph.inputs)
        self._begin({str(self.shape(value)[0]): 1 for value in model.graph.inputs})

    def _begin(self, counts: dict[str, int]) -> None:
        """Nothing is translated yet. `counts`: how many rows of an input, by the name of its first dimension, belong together."""
        self.counts = counts
        self.numbering: set[Buffer] = set()
        self.windows: dict[ir.Value, Buffer] = {}
        self.sources = Sources()
        self.known: dict[ir.Value, Known] = {}
        self.pending: dict[ir.Value, Pending] = {}
        self.steps: list[Step] = []
        self.rows: dict[bytes, Ref] = {}
        self.codes: dict[tuple[Ref, BufferKind], Ref] = {}
        self.readers: dict[Buffer, list[ir.Value]] = {}
        self.done: set[ir.Node] = set()
        self.summed: dict[ir.Node, Ref] = {}
        self.products: dict[ir.Node, Linear] = {}
        self.floats: set[ir.Node] = set()
        self.integers: dict[ir.Value, Buffer] = {}
        self.asked: dict[ir.Value, tuple[int, ...] | None] = {}
        self.sights: dict[tuple[ir.Value, int, int], Sight] = {}

    def compile(self) -> Plan:
        """Raises NotExpressible with what has no step."""
        if self.length is None and open_size(self.graph) is not None:
            first, last = self.kept
            return for_any_length(
                self.graph,
                lambda length: EncoderCompiler(
                    self.model, integer=self.integer, keep_first=first, keep_last=last, length=length
                ).compile(),
            )
        while True:
            try:
                return self._compile()
            except Regrouped as more:
                self._begin(self.counts | {more.symbol: self.counts[more.symbol] * more.factor})

    def _compile(self) -> Plan:
        inputs = [self._input(number, value) for number, value in enumerate(self.graph.inputs)]
        nodes = list(self.graph)
        for node in nodes:
            if node not in self.done:
                self._node(node)
            self.done.add(node)
        outputs = [self._output(number, value) for number, value in enumerate(self.graph.outputs)]
        return Plan(inputs, outputs, 0, 0, 0, self.steps, graph=True)

    # --- signature ---

    def _input(self, number: int, value: ir.Value) -> Value:
        if self.joined:
            return row_input(self, number, value)
        named, shape = self.shape(value), self.sized(value)
        if value.dtype != ir.DataType.FLOAT:
            integer_input(self, value, number, shape)
        elif len(shape) < 2:
            raise NotExpressible(f"an input '{value.name}' with one dimension")
        else:
            buffer = Buffer(BufferKind.INPUT, shape[-1], number, int(np.prod(shape[:-1])))
            self.define(value, self.sources.view(buffer, shape))
        return Value(str(value.name), int(value.dtype or 0), named)

    def sized(self, value: ir.Value) -> tuple[int, ...]:
        """An input's or output's shape for one image, of the length that is followed."""
        return (1, *(size if isinstance(size, int) else self.length or 0 for size in self.shape(value)[1:]))

    def shape(self, value: ir.Value) -> tuple[int | str, ...]:
        """An input's or output's sizes. Raises NotExpressible where the first one does not count images, or rows of one."""
        sizes = [] if value.shape is None else [size if isinstance(size, int) else str(size.value) for size in value.shape]
        if not sizes or sizes[0] not in (*IMAGES, *ROWS):
            raise NotExpressible(f"'{value.name}', which is not made of images")
        return tuple(sizes)

    def _output(self, number: int, value: ir.Value) -> Value:
        found, named = self.known.get(value), self.shape(value)
        if found is None or value.dtype != ir.DataType.FLOAT:
            raise NotExpressible(f"an output '{value.name}' that is not computed in floats")
        view = self._as_view(found)
        open_sizes = {size for size in named[1:] if not isinstance(size, int)}
        each = view.shape[0] if self.joined else 1
        fits = (each, *self.sized(value)[1:]) == view.shape and each == self.counts.get(str(named[0]), each)
        if not fits or not open_sizes <= {open_size(self.graph)}:
            raise NotExpressible(f"an output '{value.name}' whose sizes are not fixed")
        ref = self.rows_of(view)
        buffer = ref.buffer
        if buffer.kind != BufferKind.FLOATS or buffer.rows * buffer.width != view.size:
            buffer = Buffer(BufferKind.FLOATS, view.shape[-1], rows=view.size // view.shape[-1])
            self._copy(view, buffer)
        buffer.kind, buffer.offset = BufferKind.OUTPUT, number
        return Value(str(value.name), int(value.dtype), named, each)

    # --- values ---

    def constant(self, value: ir.Value | None) -> Array | None:
        """What a value is where it depends on nothing computed."""
        if value is None:
            return None
        if value not in self.known and value.const_value is not None and not value.is_graph_input():
            return np.asarray(value.const_value.numpy())
        found = self.known.get(value)
        return None if isinstance(found, View) else found

    def view(self, value: ir.Value | None) -> View:
        """Where a value's numbers lie; constants become a source. Raises NotExpressible for what is not known."""
        found = self.constant(value)
        if found is None and value is not None:
            computed = self.known.get(value)
            if isinstance(computed, View):
                return computed
        if found is None:
            raise NotExpressible(f"'{value.name if value is not None else ''}', which is neither computed in rows nor constant")
        return self._as_view(found)

    def _as_view(self, known: Known) -> View:
        if isinstance(known, View):
            return known
        return self.sources.view(np.asarray(known, np.float32), known.shape)

    def define(self, value: ir.Value, known: Known) -> None:
        self.known[value] = known
        if isinstance(known, View):
            for number in known.sources():
                source = self.sources.found[number]
                if isinstance(source, Buffer):
                    self.readers.setdefault(source, []).append(value)

    def rows_of(self, view: View, width: int | None = None) -> Ref:
        """The view's rows (its last dimension, or `width` numbers) in one buffer; copied there where they lie scattered."""
        width = width or view.shape[-1]
        found = self.sources.whole(view, width)
        if self.numbering and any(self.sources.found[number] is one for number in view.sources() for one in self.numbering):
            raise NotExpressible("integers that are computed with")
        if found is not None:
            return Ref(*found)
        key = hashlib.blake2b(view.places.tobytes() + str(width).encode()).digest()
        if key not in self.rows:
            buffer = Buffer(BufferKind.FLOATS, width, rows=view.size // width)
            self._copy(view, buffer)
            self.rows[key] = Ref(buffer)
        return self.rows[key]

    def _copy(self, view: View, to: Buffer) -> None:
        for source, length, pairs in self.sources.runs(view):
            places: list[Weight | None] = [integers(pairs.reshape(-1))]
            if isinstance(source, Buffer):
                self.add(GraphKind.COPY, to.width, [Ref(source)], [Ref(to)], places, [length])
            else:
                table = vector(np.asarray(source, np.float32).reshape(1, -1))
                self.add(GraphKind.COPY, to.width, [None], [Ref(to)], [*places, table], [length])

    def result(self, value: ir.Value, ref: Ref, shape: tuple[int, ...]) -> None:
        """Says that a value of that shape lies in rows from `ref` on."""
        self.define(value, self.sources.columns(ref.buffer, ref.column, shape))

    def add(
        self,
        kind: GraphKind,
        width: int,
        inputs: list[Ref | None],
        outputs: list[Ref | None],
        weights: list[Weight | None] | None = None,
        arguments: list[int] | None = None,
        reals: list[float] | None = None,
    ) -> None:
        """Appends a step."""
        self.steps.append(Step(kind, width, False, inputs, outputs, weights or [], arguments or [], reals or []))

    def fresh(self, rows: int, width: int) -> Ref:
        """A new buffer of floats."""
        return Ref(Buffer(BufferKind.FLOATS, width, rows=rows))

    # --- nodes ---

    def _node(self, node: ir.Node) -> None:
        if node.op_type == "Shape" and (found := self._extent(node.inputs[0])) is not None:
            end = node.attributes["end"].as_int() if "end" in node.attributes else None
            sizes = np.asarray(found[attribute_int(node, "start", 0) : end], np.int64)
            self.define(node.outputs[0], sizes)
            return
        if counted(self, node):
            return
        given = [self.constant(value) for value in node.inputs]
        if all(array is not None for value, array in zip(node.inputs, given, strict=True) if value is not None):
            for value, array in zip((one for one in node.outputs if one.name), folded(node, given, self.opsets), strict=True):
                self.define(value, array)
            return
        if handled(self, node):
            return
        first = self.known.get(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
        views = moved(node, first, given) if isinstance(first, View) else None
        if views is not None:
            for value, view in zip(node.outputs, views, strict=True):
                self.define(value, view)
            return
        handlers: dict[tuple[str, str], Callable[[ir.Node], None]] = {
            ("", "Concat"): self._concat,
            ("", "Conv"): lambda one: patches(self, one),
            ("", "MatMul"): self._matmul,
            (MICROSOFT, "MatMulNBits"): self._matmul,
            (MICROSOFT, "MultiHeadAttention"): lambda one: attention(self, one),
            ("", "Einsum"): lambda one: einsum(self, one),
            ("", "Softmax"): lambda one: pending(self, one),
            ("", "AveragePool"): lambda one: average_pool(self, one),
            ("", "LayerNormalization"): lambda one: norm(self, one),
            ("", "RMSNormalization"): lambda one: norm(self, one),
            (MICROSOFT, "SkipLayerNormalization"): lambda one: skip_norm(self, one),
            (MICROSOFT, "SkipSimplifiedLayerNormalization"): lambda one: skip_norm(self, one),
            ("", "Add"): lambda one: binary(self, one, GraphKind.ADD),
            ("", "Mul"): lambda one: multiply(self, one),
            ("", "Div"): lambda one: divide(self, one),
            ("", "Cast"): lambda one: convert(self, one),
            ("", "Cos"): lambda one: cosine(self, one),
            ("", "Sin"): lambda one: cosine(self, one),
            ("", "Neg"): lambda one: negate(self, one),
            ("", "ReduceSum"): lambda one: reduce_sum(self, one),
            ("", "Sigmoid"): lambda one: unary(self, one, Unary.SIGMOID, one.inputs[0]),
            ("", "Tanh"): lambda one: unary(self, one, Unary.TANH, one.inputs[0]),
            ("", "Relu"): lambda one: activate(self, one),
            ("", "Gelu"): lambda one: activate(self, one),
            (MICROSOFT, "Gelu"): lambda one: activate(self, one),
            (MICROSOFT, "FastGelu"): lambda one: activate(self, one),
            (MICROSOFT, "QuickGelu"): lambda one: activate(self, one),
        }
        if not node.domain and node.op_type in ("Mul", "Div", "Sub", "ReduceMax") and scored(self, node):
            return
        handler = handlers.get((node.domain, node.op_type))
        if handler is None:
            raise NotExpressible(node.op_type)
        handler(node)

    def _extent(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """The shape of a value that is computed, or of an input of integers."""
        found = self.known.get(value) if value is not None else None
        return found.shape if isinstance(found, View) else self.asked.get(value) if value is not None else None

    def _concat(self, node: ir.Node) -> None:
        views = [self.view(value) for value in node.inputs]
        self.define(node.outputs[0], View(np.concatenate([one.places for one in views], axis=attribute_int(node, "axis", 0))))

    # --- products ---

    def _linear(self, node: ir.Node) -> Linear | None:
        if node not in self.products:
            found = linear(node, self.constant)
            if found is None:
                return None
            self.products[node] = found
        return self.products[node]

    def form(self, node: ir.Node) -> BufferKind:
        """In what a product wants its source: floats, or 8 bits per block or row."""
        one = self._linear(node)
        if one is None or one.blocks is not None:
            return BufferKind.CODES if one is not None else BufferKind.FLOATS
        if not self.integer or one.depth > _DEEPEST or node in self._unquantised():
            return BufferKind.FLOATS
        return BufferKind.BYTES

    def _unquantised(self) -> set[ir.Node]:
        if self.kept != (0, 0) and not self.floats:
            found = [one for one in self.graph if one.op_type == "MatMul" and not one.domain and is_weight(one.inputs[1])]
            self.floats = {*found[: self.kept[0]], *found[len(found) - self.kept[1] :]}
        return self.floats

    def _matmul(self, node: ir.Node) -> None:
        one = self._linear(node)
        if one is None:
            attention(self, node)
            return
        beside = self._beside(node, one)
        if len(beside) > 1:
            self._emit(node, stacked(beside), beside)
        else:
            self._emit(node, one, beside)

    def _beside(self, node: ir.Node, one: Linear) -> list[Linear]:
        """The products of the same source whose results nothing but attention (or what moves numbers) reads."""
        found = [one]
        for user in consumers(one.source):
            other = self._linear(user) if user is not node and user not in self.done and user.op_type == node.op_type else None
            if other is not None and other.source is one.source and self.form(user) == self.form(node):
                found.append(other)
        plain = all(activated(each.out) is None and only_consumer(each.out) is not None for each in found)
        return found if plain and len(found) > 1 and alike(found) else [one]

    def _emit(self, node: ir.Node, one: Linear, outs: list[Linear]) -> None:
        view, form = self.view(one.source), self.form(node)
        ref = self.rows_of(view, one.depth)
        x = ref if form == BufferKind.FLOATS else self.quantised(ref, one.depth, form)
        out, kind = outs[0].out, Unary.IDENTITY
        self.done.update(one.nodes)
        found = activated(out) if len(outs) == 1 else None
        if found is not None:
            out, kind = found.nodes[0].outputs[0], found.kind
            self.done.update(found.nodes)
        rows = view.size // one.depth
        shape = (*view.shape[:-1], outs[0].width)
        total = self._total(one, out, rows) if form == BufferKind.BYTES and len(outs) == 1 and found is None else None
        if total is not None:
            user, ref, more = total
            self.add(GraphKind.MATMUL, one.width, [x], [ref], [one.bytes(more)], [int(kind), 1])
            self.codes = {key: codes for key, codes in self.codes.items() if key[0].buffer is not ref.buffer}
            self.summed[user] = ref
            self.result(out, ref, shape)
            return
        result = self.fresh(rows, one.width)
        weights: list[Weight | None] = [one.bytes()] if form == BufferKind.BYTES else one.weights()
        self.add(GraphKind.MATMUL, one.width, [x], [result], weights, [int(kind)])
        for number, each in enumerate(outs):
            value = out if len(outs) == 1 else each.out
            self.result(value, Ref(result.buffer, number * each.width), shape)

    def _total(self, one: Linear, out: ir.Value, rows: int) -> tuple[ir.Node, Ref, npt.NDArray[np.float32] | None] | None:
        """(the node that adds the product to what nobody needs afterwards, where that lies, the bias that comes with it)."""
        user = only_consumer(out)
        if user is None or (user.domain, user.op_type) not in [("", "Add"), *((MICROSOFT, op) for op in _SKIP_NORMS)]:
            return None
        other = next((value for value in user.inputs[:2] if value is not out), None)
        known = self.known.get(other) if other is not None else None
        if not isinstance(known, View) or known.size != rows * one.width or known.shape[-1] != one.width:
            return None
        found = self.sources.whole(known, one.width)
        if found is None or found[0].kind != BufferKind.FLOATS or found[0].width != one.width:
            return None
        for value in self.readers[found[0]]:
            if value.is_graph_output() or not all(reader in self.done or reader is user for reader in consumers(value)):
                return None
        place = 3 if user.op_type == "SkipSimplifiedLayerNormalization" else 4
        bias = self.constant(user.inputs[place]) if user.domain and len(user.inputs) > place else None
        return user, Ref(found[0]), None if bias is None else np.asarray(bias, np.float32).reshape(-1)

    def quantised(self, ref: Ref, width: int, form: BufferKind) -> Ref:
        """Rows in 8 bits, made once."""
        key = (ref if ref.buffer.width == width else Ref(ref.buffer, ref.column), form)
        found = self.codes.get(key)
        if found is None or found.buffer.width != width:
            found = Ref(Buffer(form, width, rows=ref.buffer.rows))
            self.add(GraphKind.QUANTIZE, width, [ref], [found])
            self.codes[key] = found
        return found
