"""Graphs whose first dimension counts the rows of one picture (patches, tokens), which see each other.

Such a graph is followed for as many rows as become one row of whatever has the fewest; what goes over all rows (attention,
gathering by an input of integers) is a step that does so. Rotary positions, windows and interpolation come in as integers for
each row.
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from vlm_edge.passes.graph import attribute_int, attribute_ints, last_axis_slice, only_consumer, producer

from .encoder_products import Linear
from .encoder_views import Array, View
from .errors import NotExpressible
from .panels import vector
from .plan_file import Buffer, BufferKind, GraphKind, Ref, Value

if TYPE_CHECKING:
    from .encoder import EncoderCompiler

ROWS = ("patches", "tokens")
"""What the first dimension of inputs is called where it counts rows of one picture."""
_MOST_TOGETHER = 4096
_HIDDEN = -1e30
"""What is added to scores that are not seen is below this."""


class Regrouped(Exception):
    """More rows of an input belong together than was thought."""

    def __init__(self, symbol: str, factor: int) -> None:
        super().__init__(f"{factor} times as many {symbol}")
        self.symbol = symbol
        self.factor = factor


def handled(c: EncoderCompiler, node: ir.Node) -> bool:
    """Whether a node is one of such graphs, and is done. Raises NotExpressible and Regrouped."""
    if node.domain:
        return False
    if any(value in c.windows for value in node.inputs if value is not None) or node.op_type == "Equal":
        _windows(c, node)
        return True
    first = c.known.get(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
    if node.op_type == "Reshape" and isinstance(first, View):
        _grouped(c, node, first)
        return False
    if node.op_type in ("Gather", "GatherND") and isinstance(index := c.known.get(node.inputs[1]), View):  # type: ignore[arg-type]
        _gather(c, node, index)
        return True
    if node.op_type == "Mul":
        return _rotary(c, node)
    return False


def _symbol(value: ir.Value | None, axis: int = 0) -> str:
    """The name of a dimension that has no size, else nothing."""
    shape = value.shape if value is not None else None
    size = shape[axis] if shape is not None and len(shape) > axis else 1
    return "" if isinstance(size, int) else str(size.value)


def _regrouped(c: EncoderCompiler, value: ir.Value | None, factor: int) -> Exception:
    symbol = _symbol(value)
    if symbol not in c.counts or factor * c.counts[symbol] > _MOST_TOGETHER:
        return NotExpressible(f"rows of '{value.name if value is not None else ''}' that do not divide into others")
    return Regrouped(symbol, factor)


def _grouped(c: EncoderCompiler, node: ir.Node, x: View) -> None:
    """Neighbouring rows become one: so many belong together."""
    shape = c.constant(node.inputs[1])
    if shape is None or -1 not in shape or 0 in shape:
        return
    known = int(-np.prod(shape))
    if x.size % known:
        raise _regrouped(c, node.inputs[0], known // gcd(x.size, known))


# --- integers ---


def row_input(c: EncoderCompiler, number: int, value: ir.Value) -> Value:
    """Floats [rows, numbers], or int64 [rows] or [rows, numbers]. Raises NotExpressible for others."""
    named = c.shape(value)
    fixed, given = tuple(size for size in named[1:] if isinstance(size, int)), value.dtype == ir.DataType.INT64
    if value.dtype is None or (value.dtype != ir.DataType.FLOAT and not given):
        raise NotExpressible(f"an input '{value.name}' of {value.dtype.name if value.dtype else 'no type'}")
    if len(fixed) != len(named) - 1 or not (fixed or given):
        raise NotExpressible(f"an input '{value.name}' whose sizes are not fixed")
    each, width = c.counts[str(named[0])], fixed[-1] if fixed else 1
    buffer = Buffer(BufferKind.INPUT, width, number, each * int(np.prod(fixed)) // width)
    c.define(value, c.sources.view(buffer, (each, *fixed)))
    if given:
        c.numbering.add(buffer)
    return Value(str(value.name), int(value.dtype), named, each)


def integers(c: EncoderCompiler, view: View) -> Buffer:
    """The input that a view is all of, in order. Raises NotExpressible for others."""
    source = c.sources.found[view.sources()[0]]
    if isinstance(source, Buffer) and source in c.numbering and view.size == source.rows * source.width:
        rows = View(view.places.reshape(source.rows, source.width))
        if c.sources.whole(rows, source.width) == (source, 0):
            return source
    raise NotExpressible("integers that are not an input as it is")


def convert(c: EncoderCompiler, node: ir.Node) -> None:
    """Cast of an input of integers to floats."""
    view = c.view(node.inputs[0])
    if attribute_int(node, "to", 0) != int(ir.DataType.FLOAT):
        raise NotExpressible("a Cast to other than floats")
    source = integers(c, view)
    out = c.fresh(source.rows, source.width)
    c.add(GraphKind.CONVERT, source.width, [Ref(source)], [out])
    rows = c.sources.view(out.buffer, (source.rows, source.width))
    c.define(node.outputs[0], View(rows.places.reshape(view.shape)))


def cosine(c: EncoderCompiler, node: ir.Node) -> None:
    """Cosines or sines of computed angles."""
    view = c.view(node.inputs[0])
    out = c.fresh(view.size // view.shape[-1], view.shape[-1])
    c.add(GraphKind.COSINE, view.shape[-1], [c.rows_of(view)], [out], [], [int(node.op_type == "Sin")])
    c.result(node.outputs[0], out, view.shape)


def _gather(c: EncoderCompiler, node: ir.Node, index: View) -> None:
    """Rows of what is computed, or of a table, in the order that an input says. As many are taken as there are."""
    entries = index.shape
    if node.op_type == "GatherND":
        if attribute_int(node, "batch_dims", 0) or index.shape[-1] != 1:
            raise NotExpressible("a GatherND of other than rows")
        entries = index.shape[:-1]
    elif attribute_int(node, "axis", 0):
        raise NotExpressible("a Gather of other than rows")
    places, table = Ref(integers(c, index)), c.constant(node.inputs[0])
    if table is not None:
        if table.ndim < 2 or table.dtype != np.float32:
            raise NotExpressible("a table of other than rows of floats")
        width = int(np.prod(table.shape[1:]))
        out = c.fresh(index.size, width)
        c.add(GraphKind.GATHER, width, [None, places], [out], [vector(table.reshape(len(table), width))])
        shape: tuple[int, ...] = table.shape
    else:
        view = c.view(node.inputs[0])
        shape, width = view.shape, int(np.prod(view.shape[1:]))
        if len(shape) < 2 or _symbol(node.inputs[0]) == "":
            raise NotExpressible(f"a {node.op_type} of other than rows")
        if index.size != shape[0]:
            common = gcd(index.size, shape[0])
            fewer = node.inputs[0] if index.size % shape[0] == 0 else _root(node.inputs[1])
            raise _regrouped(c, fewer, max(index.size, shape[0]) // common)
        out = c.fresh(index.size, width)
        c.add(GraphKind.GATHER, width, [c.rows_of(View(view.places.reshape(shape[0], width))), places], [out])
    rows = c.sources.view(out.buffer, (index.size, width))
    c.define(node.outputs[0], View(rows.places.reshape(*entries, *shape[1:])))


def _root(value: ir.Value | None) -> ir.Value | None:
    """What a value was before dimensions of 1 were put in."""
    while (node := producer(value, "Unsqueeze")) is not None:
        value = node.inputs[0]
    return value


# --- windows ---


def _windows(c: EncoderCompiler, node: ir.Node) -> None:
    """Rows of the same integer see each other: a matrix of which are equal, and what it adds to scores."""
    found = next((c.windows[value] for value in node.inputs if value in c.windows), None)
    if node.op_type == "Equal":
        left, right = (c.known.get(value) for value in node.inputs)  # type: ignore[arg-type]
        if not isinstance(left, View) or not isinstance(right, View):
            raise NotExpressible("a comparison of other than an input with itself")
        found = integers(c, left)
        crossed = [(_symbol(value, 0) != "", _symbol(value, 1) != "") for value in node.inputs]
        if found is not integers(c, right) or found.width != 1 or sorted(crossed) != [(False, True), (True, False)]:
            raise NotExpressible("a comparison of other than an input with itself")
    elif node.op_type == "Where":
        seen, hidden = (c.constant(value) for value in node.inputs[1:])
        if seen is None or hidden is None or np.any(seen) or hidden.size != 1 or hidden.reshape(-1)[0] > _HIDDEN:
            raise NotExpressible("a mask that does more than hide")
    elif node.op_type not in ("Unsqueeze", "Cast", "Identity"):
        raise NotExpressible(f"{node.op_type} of a mask")
    assert found is not None
    c.windows[node.outputs[0]] = found


# --- rotary positions ---


def _rotary(c: EncoderCompiler, node: ir.Node) -> bool:
    """x · cosines + (−second half of x, first half) · sines, from its first multiplication on."""
    add = only_consumer(node.outputs[0])
    if add is None or add.op_type != "Add" or add.domain:
        return False
    products = [producer(value, "Mul") for value in add.inputs]
    for plain, turned in (products, products[::-1]):
        if (
            plain is None
            or turned is None
            or only_consumer(plain.outputs[0]) is not add
            or only_consumer(turned.outputs[0]) is not add
        ):
            continue
        for x, cosines in (plain.inputs, plain.inputs[::-1]):
            for half, sines in (turned.inputs, turned.inputs[::-1]):
                nodes = _turned(half, x)
                if nodes is not None and isinstance(c.known.get(x), View):  # type: ignore[arg-type]
                    _rotate(c, add.outputs[0], c.view(x), c.view(cosines), c.view(sines))
                    c.done.update((plain, turned, add, *nodes))
                    return True
    return False


def _turned(value: ir.Value | None, x: ir.Value | None) -> tuple[ir.Node, ir.Node] | None:
    """The nodes of (−second half of x, first half), if nothing else reads them."""
    concat = producer(value, "Concat")
    size = x.shape[-1] if x is not None and x.shape is not None else None
    if concat is None or len(concat.inputs) != 2 or not isinstance(size, int) or size % 2 or x is None or x.shape is None:
        return None
    negated = producer(concat.inputs[0], "Neg")
    if negated is None or attribute_int(concat, "axis", 0) not in (-1, len(x.shape) - 1):
        return None
    if only_consumer(concat.outputs[0]) is None or only_consumer(negated.outputs[0]) is not concat:
        return None
    halves = (x, size // 2, size), (x, 0, size // 2)
    if last_axis_slice(negated.inputs[0]) != halves[0] or last_axis_slice(concat.inputs[1]) != halves[1]:
        return None
    return concat, negated


def _rotate(c: EncoderCompiler, value: ir.Value, x: View, cosines: View, sines: View) -> None:
    """Heads that share a row of cosines lie side by side in a row of the step."""
    size, count = x.shape[-1], x.size // x.shape[-1]
    tables = [np.broadcast_to(one.places, x.shape).reshape(count, size) for one in (cosines, sines)]
    own = cosines.places.reshape(-1, size)
    numbers = {int(first): row for row, first in enumerate(own[:, 0])}
    rows = np.asarray([numbers[int(first)] for first in tables[0][:, 0]])
    order = np.argsort(rows, kind="stable")
    heads = count // len(own)
    if (
        len(numbers) != len(own)
        or heads * len(own) != count
        or not np.array_equal(rows[order], np.repeat(np.arange(len(own)), heads))
    ):
        raise NotExpressible("rotary positions that heads do not share")
    source = View(x.places.reshape(count, size)[order].reshape(len(own), heads * size))
    given = [c.rows_of(View(one[order[::heads]])) for one in tables]
    out = c.fresh(len(own), heads * size)
    c.add(GraphKind.ROTARY, heads * size, [c.rows_of(source), *given], [out], [], [heads, size])
    made = c.sources.view(out.buffer, (len(own), heads * size)).places.reshape(count, size)
    back = np.empty_like(made)
    back[order] = made
    c.define(value, View(back.reshape(x.shape)))


# --- the rest ---


def negate(c: EncoderCompiler, node: ir.Node) -> None:
    """Numbers times −1."""
    from .encoder_rows import unary
    from .plan_file import Unary

    unary(c, node, Unary.IDENTITY, node.inputs[0], -1.0)


def reduce_sum(c: EncoderCompiler, node: ir.Node) -> None:
    """The sum over one axis but the last: its parts, added up one after another."""
    view = c.view(node.inputs[0])
    axes = c.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or axes.size != 1 or (axis := int(axes.reshape(-1)[0]) % view.ndim) == view.ndim - 1:
        raise NotExpressible("a ReduceSum over other than one axis before the last")
    total: Ref | None = None
    shape = view.shape[:axis] + ((1,) if attribute_int(node, "keepdims", 1) else ()) + view.shape[axis + 1 :]
    for number in range(view.shape[axis]):
        part = c.rows_of(View(np.ascontiguousarray(np.take(view.places, number, axis=axis))))
        if total is None:
            total = part
            continue
        out = c.fresh(part.buffer.rows, view.shape[-1])
        c.add(GraphKind.ADD, view.shape[-1], [total, part], [out])
        total = out
    assert total is not None
    c.result(node.outputs[0], total, shape)


def patches(c: EncoderCompiler, node: ir.Node) -> None:
    """A convolution whose windows lie side by side: a product of each with the kernels. Raises NotExpressible for others."""
    x, kernel = c.view(node.inputs[0]), c.constant(node.inputs[1])
    bias = c.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if kernel is not None and _whole(c, node, x, kernel, bias):
        return
    if kernel is None or kernel.ndim != 4 or x.ndim != 4 or x.shape[0] != 1 or attribute_int(node, "group", 1) != 1:
        raise NotExpressible("a Conv of other than pictures")
    count, channels, height, width = kernel.shape
    plain = {"strides": (height, width), "dilations": (1, 1), "pads": (0, 0, 0, 0)}
    auto = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    for name, wanted in plain.items():
        default = (1, 1) if name == "strides" else wanted
        if tuple(node.attributes[name].as_ints() if name in node.attributes else default) != wanted or auto not in (
            "NOTSET",
            "VALID",
        ):
            raise NotExpressible("a Conv whose windows do not lie side by side")
    down, across = x.shape[2] // height, x.shape[3] // width
    places = x.places[0, :, : down * height, : across * width].reshape(channels, down, height, across, width)
    view = View(np.ascontiguousarray(places.transpose(1, 3, 0, 2, 4)).reshape(down * across, channels * height * width))
    rows = c.sources.view(_with_kernels(c, node, view, kernel, bias).buffer, (down, across, count))
    c.define(node.outputs[0], View(rows.places.transpose(2, 0, 1)[None]))


def _whole(c: EncoderCompiler, node: ir.Node, x: View, kernel: Array, bias: Array | None) -> bool:
    """Whether a convolution has one window in each of its inputs, all of it: a product of their rows with the kernels."""
    plain = not any(attribute_ints(node, "pads") or ()) and set(attribute_ints(node, "dilations") or (1,)) == {1}
    if x.shape[1:] != kernel.shape[1:] or not plain or attribute_int(node, "group", 1) != 1:
        return False
    rows, count = x.shape[0], kernel.shape[0]
    out = _with_kernels(c, node, View(x.places.reshape(rows, int(np.prod(kernel.shape[1:])))), kernel, bias)
    made = c.sources.view(out.buffer, (rows, count))
    c.define(node.outputs[0], View(made.places.reshape(rows, count, *[1] * (x.ndim - 2))))
    return True


def _with_kernels(c: EncoderCompiler, node: ir.Node, view: View, kernel: Array, bias: Array | None) -> Ref:
    """The product of windows, one a row, with a convolution's kernels."""
    (rows, depth), count = view.shape, kernel.shape[0]
    one = Linear(
        node.inputs[0],  # type: ignore[arg-type]
        node.outputs[0],
        depth,
        count,
        (lambda: np.ascontiguousarray(kernel.reshape(count, depth).T, np.float32),),
        (None if bias is None else np.asarray(bias, np.float32),),
        (node,),
    )
    form = BufferKind.BYTES if c.integer and c.kept[0] == 0 else BufferKind.FLOATS
    ref = c.rows_of(view)
    given = ref if form == BufferKind.FLOATS else c.quantised(ref, depth, form)
    out = c.fresh(rows, count)
    c.add(GraphKind.MATMUL, count, [given], [out], [one.bytes()] if form == BufferKind.BYTES else one.weights(), [0])
    return out
