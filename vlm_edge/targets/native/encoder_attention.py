"""Attention of an encoder: one operator, or two products with a softmax between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from vlm_edge.passes.graph import attribute_float, attribute_int

from .encoder_texts import Sight, sight
from .encoder_views import View
from .errors import NotExpressible
from .plan_file import Buffer, GraphKind, Over, Ref

if TYPE_CHECKING:
    from .encoder import EncoderCompiler

_LARGEST_HEAD = 256


@dataclass(slots=True, frozen=True)
class Pending:
    """Scores of an attention that is written out: queries [heads, rows, size] times keys [heads, size, keys]; then softmax.

    `largest`: not the scores, but the largest of each row, which is taken off them before the softmax and changes nothing there.
    """

    queries: View
    keys: View
    scale: float = 1.0
    softmax: bool = False
    largest: bool = False


def attention(c: EncoderCompiler, node: ir.Node) -> None:
    """MultiHeadAttention, or a product of two computed values as one half of an attention. Raises NotExpressible."""
    if node.op_type == "MatMul":
        _product(c, node)
        return
    inputs = [*node.inputs, *[None] * 8]
    others = [*inputs[3:5], *inputs[6:]]
    if any(one is not None for one in others) or attribute_int(node, "unidirectional", 0) or len(node.outputs) > 1:
        raise NotExpressible("an attention with a bias or a past")
    views = [c.view(value) for value in inputs[:3]]
    if any(one.ndim != 3 for one in views):
        raise NotExpressible("an attention over other than rows")
    heads, width = attribute_int(node, "num_heads", 1), views[0].shape[-1]
    scale = attribute_float(node, "scale", 0.0) or (width // heads) ** -0.5
    mask, rows, keys = inputs[5], views[0].shape[1], views[1].shape[1]
    windows = c.windows.get(mask) if mask is not None else None
    seen = sight(c, mask, rows, keys) if mask is not None and windows is None else Sight()
    places = _emit(c, views, heads, scale, seen, _over(c, node.inputs[0]), windows)
    c.define(node.outputs[0], View(places.places.reshape(views[0].shape)))


def _over(c: EncoderCompiler, queries: ir.Value | None) -> Over:
    """What an attention [1, rows, …] goes over: the rows of an image, or of all of them where they are one picture's."""
    if not c.joined:
        return Over.IMAGE
    if queries is None or queries.shape is None or queries.shape[0] != 1:
        raise NotExpressible("an attention within some rows of a picture")
    return Over.ALL


def _emit(
    c: EncoderCompiler,
    views: list[View],
    heads: int,
    scale: float,
    seen: Sight | None = None,
    over: Over = Over.IMAGE,
    windows: Buffer | None = None,
) -> View:
    """Queries, keys and values as rows of all heads' numbers → what comes out, in such rows.

    `windows`: the input whose equal integers say which rows see each other.
    """
    width = views[0].shape[-1]
    size = width // heads
    if width % heads or size > _LARGEST_HEAD or any(one.shape[-1] != width for one in views):
        raise NotExpressible(f"attention heads of {width} / {heads} numbers, or of unlike ones")
    query, key, value = (c.rows_of(one) for one in views)
    out = c.fresh(query.buffer.rows, width)
    # Halves where the CPU multiplies them: beside products in 8 bits their error is not seen, and that takes half the time.
    seen = seen or Sight()
    if over != Over.IMAGE and seen != Sight():
        raise NotExpressible("a mask over all rows of a picture")
    mask = [Ref(c.integers[seen.mask])] if seen.mask is not None else [Ref(windows)] if windows is not None else []
    over = over if windows is None else Over.SEGMENTS
    arguments = [heads, size, int(c.integer), int(seen.causal), seen.prefix, int(over)]
    c.add(GraphKind.ATTENTION, width, [query, key, value, *mask], [out], [], arguments, [scale])
    return c.sources.view(out.buffer, (out.buffer.rows, width))


def _heads(view: View) -> View:
    """[…, rows, size] with all that stands before as heads."""
    return View(view.places.reshape(-1, *view.shape[-2:]))


def einsum(c: EncoderCompiler, node: ir.Node) -> None:
    """The two products of an attention in Einstein's notation. Raises NotExpressible for others."""
    equation = node.attributes["equation"].as_string().replace(" ", "").replace("...", "")
    left, _, rest = equation.partition(",")
    right, _, out = rest.partition("->")
    plain = len(left) == len(right) == len(out) >= 2 and len(set(left) | set(right)) == len(left) + 1
    if not plain or left[:-2] != right[:-2] or out[:-1] != left[:-1]:
        raise NotExpressible(f"Einsum '{equation}'")
    if (left[-1], out[-1]) == (right[-1], right[-2]):
        _product(c, node, turned=True)
    elif (left[-1], out[-1]) == (right[-2], right[-1]):
        _product(c, node)
    else:
        raise NotExpressible(f"Einsum '{equation}'")


def scored(c: EncoderCompiler, node: ir.Node) -> bool:
    """Whether a node only scales an attention's scores, or takes the largest of each row off them; it is then done."""
    scores = c.pending.get(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
    if scores is None or scores.softmax:
        return False
    if node.op_type == "ReduceMax":
        axes = c.constant(node.inputs[1]) if len(node.inputs) > 1 else None
        rank = scores.queries.ndim
        if (
            axes is None
            or axes.size != 1
            or int(axes.reshape(-1)[0]) % rank != rank - 1
            or not attribute_int(node, "keepdims", 1)
        ):
            return False
        c.pending[node.outputs[0]] = replace(scores, largest=True)
        return True
    if scores.largest:
        return False
    if node.op_type == "Sub":
        other = c.pending.get(node.inputs[1]) if node.inputs[1] is not None else None
        if other is None or other != replace(scores, largest=True):
            return False
        c.pending[node.outputs[0]] = scores
        return True
    factor = c.constant(node.inputs[1])
    if factor is None or factor.size != 1:
        return False
    number = float(factor.reshape(-1)[0])
    c.pending[node.outputs[0]] = replace(scores, scale=scores.scale * number if node.op_type == "Mul" else scores.scale / number)
    return True


def _product(c: EncoderCompiler, node: ir.Node, *, turned: bool = False) -> None:
    """`turned`: the right side has the axis that is summed over last."""
    if c.joined:
        raise NotExpressible("a product of two computed matrices")
    weights = c.pending.get(node.inputs[0]) if node.inputs[0] is not None else None
    right = c.view(node.inputs[1])
    if turned:
        right = View(np.ascontiguousarray(np.swapaxes(right.places, -1, -2)))
    if weights is None:
        left = c.view(node.inputs[0])
        if left.ndim < 3 or left.shape[:-2] != right.shape[:-2]:
            raise NotExpressible("a product of two computed matrices")
        c.pending[node.outputs[0]] = Pending(left, right)
        return
    if not weights.softmax:
        raise NotExpressible("a product of two computed matrices")
    lead = weights.queries.shape[:-2]
    queries, keys, values = _heads(weights.queries), _heads(weights.keys), _heads(right)
    heads, rows, size = queries.shape
    if values.shape != (heads, keys.shape[-1], size):
        raise NotExpressible("an attention whose values have another size than its keys")
    flat = [
        View(np.ascontiguousarray(places).reshape(-1, heads * size))
        for places in (queries.places.transpose(1, 0, 2), keys.places.transpose(2, 0, 1), values.places.transpose(1, 0, 2))
    ]
    out = _emit(c, flat, heads, weights.scale)
    places = out.places.reshape(rows, heads, size).transpose(1, 0, 2)
    c.define(node.outputs[0], View(np.ascontiguousarray(places).reshape(*lead, rows, size)))


def pending(c: EncoderCompiler, node: ir.Node) -> None:
    """The softmax between the two products of an attention. Raises NotExpressible for any other."""
    scores = c.pending.get(node.inputs[0]) if node.inputs[0] is not None else None
    dims = len(node.inputs[0].shape) if node.inputs[0] is not None and node.inputs[0].shape is not None else 0
    if scores is None or scores.softmax or scores.largest or attribute_int(node, "axis", -1) not in (-1, dims - 1):
        raise NotExpressible("a Softmax outside of an attention")
    c.pending[node.outputs[0]] = replace(scores, softmax=True)
