"""Norms and elementwise operations of rows as steps."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlm_edge.passes.graph import attribute_float, attribute_int, consumers, fixed_dim, is_weight, scalar

from .builder import Context, Rows
from .errors import NotExpressible
from .panels import vector
from .patterns import activation
from .plan_file import BufferKind, Kind, Ref, Unary, Weight
from .token_masks import seen_gate


class RowWise:
    """Steps that compute each row of numbers from the same row of others."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.made = context.made
        self._vectors: dict[tuple[ir.Value, tuple[int, ...]], Weight] = {}

    # --- norms ---

    def norm(self, node: ir.Node) -> None:
        """RMSNormalization or LayerNormalization of whole rows or of each head in a row."""
        rows, (out, size) = self.made.rows(node.inputs[0]), (node.outputs[0], fixed_dim(node.inputs[1], -1))
        axis, inputs = attribute_int(node, "axis", -1), [*node.inputs, None]
        dims = len(out.shape) if out.shape is not None else 3
        if size is None or rows.width % size or axis not in (-1, dims - 1) or any(one.uses() for one in node.outputs[1:]):
            raise NotExpressible(f"{node.op_type} over other than the last axis")
        ref = self.made.floats(rows.width)
        codes = self._codes_ref(out, ref, rows.width) if size == rows.width else None
        layer = int(node.op_type == "LayerNormalization")
        weights = [self._optional(node.inputs[1], (size,)), self._optional(inputs[2], (size,))]
        arguments, reals = [layer, rows.width // size], [attribute_float(node, "epsilon", 1e-5)]
        self.made.add(Kind.NORM, rows.width, rows.last, [rows.ref], [ref, None, codes], weights, arguments, reals)
        self.made.define(out, ref, rows.width, rows.last)

    def skip_norm(self, node: ir.Node) -> None:
        """The norm of a sum, and the sum."""
        simplified = node.op_type == "SkipSimplifiedLayerNormalization"
        left, right = self.made.rows(node.inputs[0]), self.rows(node.inputs[1])
        inputs = [*node.inputs, *[None] * 3]
        beta, bias = (None, inputs[3]) if simplified else (inputs[3], inputs[4])
        width = left.width
        if right is None or right.width != width or right.last != left.last:
            raise NotExpressible(f"{node.op_type} of unlike rows")
        total, ref = self.made.floats(width), self.made.floats(width)
        codes = self._codes_ref(node.outputs[0], ref, width)
        weights = [self._optional(value, (width,)) for value in (node.inputs[2], beta, bias)]
        reals = [attribute_float(node, "epsilon", 1e-12)]
        self.made.add(
            Kind.NORM, width, left.last, [left.ref, right.ref], [ref, total, codes], weights, [int(not simplified), 1], reals
        )
        self.made.define(node.outputs[0], ref, width, left.last)
        if len(node.outputs) > 3:
            self.made.define(node.outputs[3], total, width, left.last)

    def _codes_ref(self, value: ir.Value, ref: Ref, width: int) -> Ref | None:
        if not any(user.op_type == "MatMulNBits" for user in consumers(value)):
            return None
        codes = self.made.floats(width)
        codes.buffer.kind = BufferKind.CODES
        self.made.codes[ref] = codes
        return codes

    # --- elementwise ---

    def rows(self, value: ir.Value | None) -> Rows | None:
        """Where a value is, None for one that is not computed."""
        return self.made.values.get(value) if value is not None else None

    def activation(self, node: ir.Node) -> None:
        """An activation function, however the graph spells it."""
        found = activation(node.outputs[0])
        if found is None:
            raise NotExpressible(f"{node.op_type} of an unknown kind")
        self.unary(node, found.kind, found.source)

    def unary(self, node: ir.Node, kind: Unary, source: ir.Value | None, before: float = 1.0, after: float = 1.0) -> None:
        """`kind` of source · before, times after."""
        rows = self.made.rows(source)
        ref = self.made.floats(rows.width)
        self.made.add(Kind.UNARY, rows.width, rows.last, [rows.ref], [ref], [], [int(kind)], [before, after])
        self.made.define(node.outputs[0], ref, rows.width, rows.last)

    def add(self, node: ir.Node) -> None:
        """Of two rows, or of a row and a stored vector."""
        self._binary(node, Kind.ADD)

    def subtract(self, node: ir.Node) -> None:
        """x − y as x + (−1) · y."""
        left, right = node.inputs
        taken = self.rows(right)
        if taken is None:
            first = self.made.rows(left)
            self._with_vector(node, Kind.ADD, first, right, -1.0)
            return
        ref = self.made.floats(taken.width)
        self.made.add(Kind.UNARY, taken.width, taken.last, [taken.ref], [ref], [], [int(Unary.IDENTITY)], [-1.0, 1.0])
        negative = Rows(ref, taken.width, taken.last)
        first_rows = self.rows(left)
        if first_rows is None:
            self._with_vector(node, Kind.ADD, negative, left)
        else:
            self._of_rows(node, Kind.ADD, first_rows, negative)

    def multiply(self, node: ir.Node) -> None:
        """An activation, a number times a row, rows of tokens that see a picture (others become 0), or a product of rows."""
        found = activation(node.outputs[0])
        if found is not None and found.source in self.made.values:
            self.unary(node, found.kind, found.source)
            return
        for x, given in (node.inputs, node.inputs[::-1]):
            factor = scalar(given)
            if factor is not None:
                self.unary(node, Unary.IDENTITY, x, factor)
                return
            if given is not None and given not in self.made.values and not is_weight(given) and x in self.made.values:
                self.gate(node, x, given)
                return
        self._binary(node, Kind.MULTIPLY)

    def gate(self, node: ir.Node, x: ir.Value | None, gate: ir.Value, *, keeps_seeing: bool = True) -> None:
        """Rows of tokens that see a picture; 0 for the others."""
        rows = self.made.rows(x)
        name, sees = seen_gate(self.context.model, gate)
        if sees != keeps_seeing:
            raise NotExpressible(f"a {node.op_type} that keeps what sees no picture")
        ref = self.made.floats(rows.width)
        self.made.add(Kind.SEEN, rows.width, rows.last, [rows.ref], [ref], [], [self.context.further.index(name)])
        self.made.define(node.outputs[0], ref, rows.width, rows.last)

    def divide(self, node: ir.Node) -> None:
        """By a number."""
        divisor = scalar(node.inputs[1])
        if not divisor:
            raise NotExpressible("a division by what is not a constant")
        self.unary(node, Unary.IDENTITY, node.inputs[0], 1.0 / divisor)

    def greater(self, node: ir.Node) -> None:
        """1 where a row's numbers are greater than a number, else 0."""
        rows, least = self.made.rows(node.inputs[0]), scalar(node.inputs[1])
        if least is None:
            raise NotExpressible("a comparison with what is not a constant")
        ref = self.made.floats(rows.width)
        self.made.add(Kind.GREATER, rows.width, rows.last, [rows.ref], [ref], [], [], [least])
        self.made.define(node.outputs[0], ref, rows.width, rows.last)

    def cast(self, node: ir.Node) -> None:
        """Truth as 0 or 1, which it is already."""
        rows = self.made.rows(node.inputs[0])
        if node.outputs[0].dtype != ir.DataType.FLOAT:
            raise NotExpressible(f"a Cast to {node.outputs[0].dtype}")
        self.made.define(node.outputs[0], rows.ref, rows.width, rows.last)

    def put_where(self, node: ir.Node, hidden: ir.Value | None, filler: float, x: ir.Value | None) -> None:
        """`filler` in the places of a stored condition: numbers so large that what is added to them does not matter."""
        condition = hidden.const_value if hidden is not None and is_weight(hidden) else None
        if condition is None or filler > -1e30:
            raise NotExpressible("a Where that does not hide stored places")
        rows = self.made.rows(x)
        given = np.where(condition.numpy().reshape(-1), np.float32(filler), np.float32(0))
        if given.size != rows.width:
            raise NotExpressible("a Where whose condition is not a row")
        ref = self.made.floats(rows.width)
        self.made.add(Kind.ADD, rows.width, rows.last, [rows.ref], [ref], [vector(given)])
        self.made.define(node.outputs[0], ref, rows.width, rows.last)

    def _binary(self, node: ir.Node, kind: Kind) -> None:
        left, right = (self.rows(value) for value in node.inputs)
        if left is not None and right is not None:
            self._of_rows(node, kind, left, right)
        elif left is not None:
            self._with_vector(node, kind, left, node.inputs[1])
        elif right is not None:
            self._with_vector(node, kind, right, node.inputs[0])
        else:
            raise NotExpressible(f"{node.op_type} of nothing computed")

    def _of_rows(self, node: ir.Node, kind: Kind, left: Rows, right: Rows) -> None:
        if (left.width, left.last) != (right.width, right.last):
            raise NotExpressible(f"{node.op_type} of unlike rows")
        ref = self.made.floats(left.width)
        self.made.add(kind, left.width, left.last, [left.ref, right.ref], [ref])
        self.made.define(node.outputs[0], ref, left.width, left.last)

    def _with_vector(self, node: ir.Node, kind: Kind, rows: Rows, other: ir.Value | None, factor: float = 1.0) -> None:
        shape = node.outputs[0].shape
        dims = tuple(size for size in (shape if shape is not None else ()) if isinstance(size, int)) or (rows.width,)
        if int(np.prod(dims)) != rows.width:
            raise NotExpressible(f"{node.op_type} of rows of unlike widths")
        weight = self._vector(other, dims) if factor == 1.0 else vector(factor * self._numbers(other, dims))
        ref = self.made.floats(rows.width)
        self.made.add(kind, rows.width, rows.last, [rows.ref], [ref], [weight])
        self.made.define(node.outputs[0], ref, rows.width, rows.last)

    # --- stored vectors ---

    def _optional(self, value: ir.Value | None, dims: tuple[int, ...]) -> Weight | None:
        return None if value is None else self._vector(value, dims)

    def _vector(self, value: ir.Value | None, dims: tuple[int, ...]) -> Weight:
        if value is None:
            raise NotExpressible("a vector that is not there")
        if (value, dims) not in self._vectors:
            self._vectors[value, dims] = vector(self._numbers(value, dims))
        return self._vectors[value, dims]

    def _numbers(self, value: ir.Value | None, dims: tuple[int, ...]) -> np.typing.NDArray[np.float32]:
        """A stored operand as the numbers of one row of `dims`."""
        given = self.context.rows_of_all.get(value) if value is not None else None
        if given is None and value is not None and is_weight(value) and value.const_value is not None:
            given = value.const_value.numpy()
        name = value.name if value is not None else ""
        if given is None:
            raise NotExpressible(f"'{name}', which is neither a row per token nor stored")
        found = np.asarray(given, np.float32)
        while found.ndim > len(dims) and found.shape[0] == 1:
            found = found[0]
        try:
            return np.ascontiguousarray(np.broadcast_to(found, dims)).reshape(-1)
        except ValueError:
            raise NotExpressible(f"'{name}' is not a stored vector of {int(np.prod(dims))}") from None
