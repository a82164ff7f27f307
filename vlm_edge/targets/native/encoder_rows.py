"""What goes over the rows of an encoder one by one: norms, activations, sums and products of numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from vlm_edge.passes.graph import attribute_float, attribute_int, attribute_ints, consumers

from .encoder_views import Array, View
from .errors import NotExpressible
from .panels import vector
from .patterns import activation
from .plan_file import Buffer, BufferKind, GraphKind, Ref, Unary, Weight

if TYPE_CHECKING:
    from .encoder import EncoderCompiler


def _norm_codes(c: EncoderCompiler, value: ir.Value, rows: int, width: int) -> tuple[Ref | None, bool]:
    """(where a norm's rows go in 8 bits, whether anything reads them as floats)."""
    forms = {c.form(user) if user.inputs[0] is value else BufferKind.FLOATS for user in consumers(value)}
    plain = BufferKind.FLOATS in forms or value.is_graph_output()
    wanted = forms - {BufferKind.FLOATS}
    if len(wanted) != 1:
        return None, True
    return Ref(Buffer(wanted.pop(), width, rows=rows)), plain


def _normed(
    c: EncoderCompiler,
    node: ir.Node,
    source: list[Ref | None],
    total: Ref | None,
    shape: tuple[int, ...],
    weights: list[Array | None],
) -> None:
    value, width, size = node.outputs[0], shape[-1], weights[0].size  # type: ignore[union-attr]
    rows = int(np.prod(shape[:-1]))
    codes, plain = _norm_codes(c, value, rows, width) if size == width else (None, True)
    out = c.fresh(rows, width)
    layer = int("Layer" in node.op_type and "Simplified" not in node.op_type)
    stored: list[Weight | None] = [None if one is None else vector(np.asarray(one, np.float32).reshape(1, -1)) for one in weights]
    epsilon = attribute_float(node, "epsilon", 1e-12 if node.domain else 1e-5)
    c.add(GraphKind.NORM, width, source, [out if plain else None, total, codes], stored, [layer, width // size], [epsilon])
    c.result(value, out, shape)
    if codes is not None:
        c.codes[out, codes.buffer.kind] = codes


def norm(c: EncoderCompiler, node: ir.Node) -> None:
    view, weight = c.view(node.inputs[0]), c.constant(node.inputs[1])
    bias = c.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    axis = attribute_int(node, "axis", -1)
    if weight is None or weight.ndim != 1 or view.shape[-1] != weight.size or axis not in (-1, view.ndim - 1):
        raise NotExpressible(f"{node.op_type} over other than the last axis")
    if any(out.uses() for out in node.outputs[1:]):
        raise NotExpressible(f"{node.op_type} whose mean is read")
    _normed(c, node, [c.rows_of(view)], None, view.shape, [weight, bias, None])


def skip_norm(c: EncoderCompiler, node: ir.Node) -> None:
    simplified = node.op_type == "SkipSimplifiedLayerNormalization"
    inputs = [*node.inputs, *[None] * 3]
    beta, bias = (None, inputs[3]) if simplified else (inputs[3], inputs[4])
    left, right = (c.view(value) for value in inputs[:2])
    given = [c.constant(value) for value in (inputs[2], beta)]
    if given[0] is None or left.shape[-1] != given[0].size or left.size != right.size:
        raise NotExpressible(f"{node.op_type} of unlike rows")
    width, total = left.shape[-1], c.summed.get(node)
    if total is not None:
        source: list[Ref | None] = [total]
        out, more = None, None
    else:
        source = [c.rows_of(left), c.rows_of(right)]
        total = out = c.fresh(left.size // width, width)
        more = c.constant(bias)
    _normed(c, node, source, out, left.shape, [*given, more])
    if len(node.outputs) > 3 and node.outputs[3].name:
        c.result(node.outputs[3], total, left.shape)


def activate(c: EncoderCompiler, node: ir.Node) -> None:
    found = activation(node.outputs[0])
    if found is None:
        raise NotExpressible(f"{node.op_type} of an unknown kind")
    unary(c, node, found.kind, found.source)


def unary(
    c: EncoderCompiler, node: ir.Node, kind: Unary, source: ir.Value | None, before: float = 1.0, after: float = 1.0
) -> None:
    view = c.view(source)
    ref = c.rows_of(view)
    out = c.fresh(ref.buffer.rows, view.shape[-1])
    c.add(GraphKind.UNARY, view.shape[-1], [ref], [out], [], [int(kind)], [before, after])
    c.result(node.outputs[0], out, view.shape)


def multiply(c: EncoderCompiler, node: ir.Node) -> None:
    found = activation(node.outputs[0])
    if found is not None and isinstance(c.known.get(found.source), View):
        unary(c, node, found.kind, found.source)
        return
    for x, given in (node.inputs, node.inputs[::-1]):
        factor = c.constant(given)
        if factor is not None and factor.size == 1 and x in c.known:
            unary(c, node, Unary.IDENTITY, x, float(factor.reshape(-1)[0]))
            return
    binary(c, node, GraphKind.MULTIPLY)


def divide(c: EncoderCompiler, node: ir.Node) -> None:
    divisor = c.constant(node.inputs[1])
    if divisor is None or divisor.size != 1 or not divisor.reshape(-1)[0]:
        raise NotExpressible("a division by what is not a constant number")
    unary(c, node, Unary.IDENTITY, node.inputs[0], 1.0 / float(divisor.reshape(-1)[0]))


def average_pool(c: EncoderCompiler, node: ir.Node) -> None:
    """Means over windows that lie side by side: their rows of channels, added up one after another."""
    view, kernel = c.view(node.inputs[0]), attribute_ints(node, "kernel_shape") or ()
    spatial = view.shape[2:]
    plain = attribute_ints(node, "strides") == kernel and not any(attribute_ints(node, "pads") or ())
    whole = len(spatial) == len(kernel) == 2 and all(size % step == 0 for size, step in zip(spatial, kernel, strict=True))
    if not plain or not whole or (attribute_ints(node, "dilations") or (1, 1)) != (1, 1):
        raise NotExpressible("an AveragePool whose windows do not lie side by side")
    places = view.places[0].transpose(1, 2, 0)
    down, across = kernel
    parts = [View(np.ascontiguousarray(places[i::down, j::across])) for i in range(down) for j in range(across)]
    total, width = c.rows_of(parts[0]), view.shape[1]
    rows = parts[0].size // width
    for part in parts[1:]:
        out = c.fresh(rows, width)
        c.add(GraphKind.ADD, width, [total, c.rows_of(part)], [out])
        total = out
    out = c.fresh(rows, width)
    c.add(GraphKind.UNARY, width, [total], [out], [], [int(Unary.IDENTITY)], [1.0, 1.0 / len(parts)])
    found = c.sources.columns(out.buffer, 0, parts[0].shape)
    c.define(node.outputs[0], View(np.ascontiguousarray(found.places.transpose(2, 0, 1))[None]))


def binary(c: EncoderCompiler, node: ir.Node, kind: GraphKind) -> None:
    if node in c.summed:
        ref = c.summed[node]
        found = next(view for value in node.inputs if isinstance(view := c.known.get(value), View))  # type: ignore[arg-type]
        c.result(node.outputs[0], ref, found.shape)
        return
    constants: list[Any] = [c.constant(value) for value in node.inputs]
    views = [c.view(value) for value, array in zip(node.inputs, constants, strict=True) if array is None]
    shape, first = np.broadcast_shapes(*(_extent(c, value) for value in node.inputs)), views[0]
    width = shape[-1]
    left = c.rows_of(View(np.broadcast_to(first.places, shape)))
    out = c.fresh(left.buffer.rows, width)
    if len(views) == 2:
        right = c.rows_of(View(np.broadcast_to(views[1].places, shape)))
        c.add(kind, width, [left, right], [out])
    else:
        array = next(one for one in constants if one is not None)
        table = np.broadcast_to(np.asarray(array, np.float32), shape).reshape(-1, width)
        same = bool((table == table[0]).all())
        c.add(kind, width, [left], [out], [vector(table[:1] if same else table)])
    c.result(node.outputs[0], out, shape)


def _extent(c: EncoderCompiler, value: ir.Value | None) -> tuple[int, ...]:
    found = c.constant(value)
    return found.shape if found is not None else c.view(value).shape
