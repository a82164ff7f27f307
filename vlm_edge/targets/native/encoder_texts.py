"""What whole numbers decide in a graph over texts: rows of tables, which keys are hidden, the token that stands for a text.

Nothing is told by how it is written: the part of the graph that makes a mask or an index is run on drawn numbers, and what it
gives is compared with the rules that have a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.evaluate import evaluate, graph_inputs_of
from vlm_edge.passes.graph import attribute_int

from .encoder_views import View
from .errors import NotExpressible
from .panels import half_rows, vector
from .plan_file import Buffer, BufferKind, GraphKind, Ref

if TYPE_CHECKING:
    from .encoder import EncoderCompiler

Array = npt.NDArray[Any]
_TEXTS = 24
"""Texts that are drawn; fewer of large masks, of which `_MOST` numbers are enough, but two."""
_MOST = 1 << 22
_SMALL, _IDS = 20, 1000
"""Numbers are drawn below these: so small that some are drawn twice, or as many as tokens."""
_EXACT = 1 << 24
"""Floats hold whole numbers up to this."""
_LARGEST, _EQUAL, _LAST = range(3)
"""`GraphPick` in plan_graph.h."""


@dataclass(slots=True, frozen=True)
class Sight:
    """What queries see: keys from `prefix` on only where `mask` is not 0; `causal`: none after themselves."""

    mask: ir.Value | None = None
    prefix: int = 0
    causal: bool = False


def integer_input(c: EncoderCompiler, value: ir.Value, number: int, shape: tuple[int, ...]) -> None:
    """An input of int64 [images, rows]. Raises NotExpressible for another type or shape."""
    if value.dtype != ir.DataType.INT64 or len(shape) != 2:
        raise NotExpressible(
            f"an input '{value.name}' of {value.dtype.name if value.dtype else 'no type'} with {len(shape)} dimensions"
        )
    c.integers[value] = Buffer(BufferKind.INPUT, 1, number, shape[1])
    c.asked[value] = shape


def counted(c: EncoderCompiler, node: ir.Node) -> bool:
    """Whether a node computes with integers of the inputs and constants only; it is then evaluated where it is read."""
    given = [value for value in node.inputs if value is not None]
    if node.op_type == "Cast" and isinstance(known := c.known.get(given[0]), View) and given[0].dtype == ir.DataType.FLOAT16:
        c.define(node.outputs[0], known)  # rows of a table in half precision are floats when they are taken
        return True
    if not any(value in c.asked for value in given):
        return False
    if node.op_type == "Gather" and not node.domain and _lookup(c, node):
        return True
    if all(value in c.asked or c.constant(value) is not None for value in given):
        c.asked.update((value, None) for value in node.outputs)
        return True
    if node.op_type == "GatherND" and not node.domain:
        _pick(c, node)
        return True
    return False


def _lookup(c: EncoderCompiler, node: ir.Node) -> bool:
    """Rows of a stored table that an input names."""
    table, indices = c.constant(node.inputs[0]), node.inputs[1]
    if table is None or table.ndim != 2 or not np.issubdtype(table.dtype, np.floating) or attribute_int(node, "axis", 0) != 0:
        return False
    feeds = _drawn(c, indices, max(table.shape[0], _IDS))  # beyond the table, too: only the index is computed
    found = _evaluated(c, indices, feeds)
    for value, buffer in c.integers.items():
        given = feeds[str(value.name)]
        if found.shape[:1] == given.shape[:1] and found.size == given.size and np.array_equal(found.reshape(given.shape), given):
            out = c.fresh(buffer.rows, table.shape[1])
            halves = table.dtype == np.float16 or (c.integer and bool(np.abs(table).max() <= np.finfo(np.float16).max))
            stored = half_rows(table) if halves else vector(np.asarray(table, np.float32))
            c.add(GraphKind.GATHER, table.shape[1], [None, Ref(buffer)], [out], [stored])
            c.result(node.outputs[0], out, (1, *found.shape[1:], table.shape[1]))
            return True
    raise NotExpressible(f"rows of a table by numbers that no input has ('{indices.name if indices else ''}')")


def sight(c: EncoderCompiler, mask: ir.Value, rows: int, keys: int) -> Sight:
    """What an additive mask [1 or batch, 1, rows, keys] hides. Raises NotExpressible for any other rule, or a bias."""
    causal = np.tri(rows, keys, dtype=bool)
    known = c.constant(mask)
    if known is not None:
        for found in (Sight(), Sight(causal=True)):
            if (found.causal and rows != keys) or not _hides(known, causal if found.causal else np.ones((rows, keys), bool)):
                continue
            return found
        raise NotExpressible("an attention with a bias")
    if mask not in c.asked:
        raise NotExpressible("an attention with a bias that is computed")
    key = (mask, rows, keys)
    if key not in c.sights:
        c.sights[key] = _rule(c, mask, causal)
    return c.sights[key]


def _rule(c: EncoderCompiler, mask: ir.Value, causal: npt.NDArray[np.bool_]) -> Sight:
    """What a mask that is computed hides. Rows that see nothing are compared after a build."""
    rows, keys = causal.shape
    texts = max(2, min(_TEXTS, _MOST // (rows * keys)))
    feeds = _drawn(c, mask, _SMALL, texts)
    added = _evaluated(c, mask, feeds)
    inputs = set(graph_inputs_of([mask]))
    for value, buffer in c.integers.items():
        prefix = keys - buffer.rows
        if prefix < 0 or value not in inputs:
            continue
        given = feeds[str(value.name)] != 0
        seen = np.concatenate([np.ones((texts, prefix), bool), given], axis=1)[:, None, None]
        if _hides(added, np.broadcast_to(seen, (texts, 1, rows, keys))):
            return Sight(value, prefix)
        if rows == keys and _hides(added, seen & causal):
            return Sight(value, prefix, True)
    raise NotExpressible("an attention with a mask of an unknown rule")


def _hides(found: Array, seen: npt.NDArray[np.bool_]) -> bool:
    try:
        found, seen = np.broadcast_arrays(found, seen)
    except ValueError:
        return False
    right = found == seen if found.dtype == np.bool_ else np.where(seen, found == 0, found < -1e30)
    return bool((right | ~seen.any(axis=-1, keepdims=True)).all())


def _pick(c: EncoderCompiler, node: ir.Node) -> None:
    """One row of each text: of the largest number (CLIP's end of text), of a certain one, or as far in as tokens are valid."""
    view, index = c.view(node.inputs[0]), node.inputs[1]
    if attribute_int(node, "batch_dims", 0) or view.ndim != 3 or index is None:
        raise NotExpressible("a GatherND of other than one row of each text")
    rules = [(_LARGEST, 0), (_LAST, 0), *((_EQUAL, number) for number in _numbers(c, index))]
    inputs = set(graph_inputs_of([index]))
    for value, buffer in c.integers.items():
        if value not in inputs or buffer.rows != view.shape[1]:
            continue
        for rule, number in rules:
            if _picks(c, index, value, rule, number):
                out = c.fresh(1, view.shape[2])
                c.add(GraphKind.PICK, view.shape[2], [c.rows_of(view), Ref(buffer)], [out], [], [rule, number])
                c.result(node.outputs[0], out, (1, view.shape[2]))
                return
    raise NotExpressible("a token of each text that is chosen by an unknown rule")


def _picks(c: EncoderCompiler, index: ir.Value, value: ir.Value, rule: int, number: int) -> bool:
    feeds = _drawn(c, index, _SMALL)
    given, generator = feeds[str(value.name)], np.random.default_rng(1)
    texts, rows = given.shape
    if rule == _LAST:
        valid, places = generator.integers(1, rows + 1, (texts, 1)), np.arange(rows)
        hidden = generator.random((texts, rows)) < 0.5
        hidden[::3] = (places >= valid)[::3]
        hidden[1::3] = (places < rows - valid)[1::3]
        hidden[2] = True  # a text of nothing: the index is -1, the last
        given[:] = np.where(hidden, 0, np.maximum(given, 1))
        wanted = (~hidden).sum(axis=1) - 1
    elif rule == _EQUAL:
        given[given == number] += 1
        there = generator.random((texts, rows)) < 0.3
        there[0] = False  # a text without it
        given[there] = number
        wanted = there.argmax(axis=1)
    else:
        wanted = given.argmax(axis=1)
    found = _evaluated(c, index, feeds)
    if found.shape != (texts, 2) or not np.array_equal(found[:, 0], np.arange(texts)):
        return False
    return np.array_equal(np.where(found[:, 1] < 0, found[:, 1] + rows, found[:, 1]), wanted % rows)


def _numbers(c: EncoderCompiler, value: ir.Value) -> list[int]:
    """The whole numbers that a value is computed with."""
    found: dict[int, None] = {}
    todo, seen = [value], set()
    while todo:
        node = todo.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        for one in node.inputs:
            if one is None:
                continue
            known = c.constant(one)
            if known is None:
                todo.append(one)
            elif known.size <= _TEXTS and known.dtype.kind in "iuf":
                found.update(
                    (int(number), None) for number in known.reshape(-1) if abs(number) < _EXACT and number == int(number)
                )
    return list(found)


def _drawn(c: EncoderCompiler, value: ir.Value | None, limit: int, texts: int = _TEXTS) -> dict[str, Array]:
    """Inputs of some texts: masks of 0 and 1, other whole numbers below `limit` or beside those `value` is computed with.

    Floats are 0. One text is all ones where it is a mask.
    """
    generator, feeds = np.random.default_rng(0), {}
    beside = {number + more for number in (_numbers(c, value) if value is not None else []) for more in (-1, 0, 1)}
    near = np.asarray(sorted({0, 1} | {number for number in beside if number >= 0}))
    for one in c.graph.inputs:
        shape = (texts, *c.sized(one)[1:])
        if one not in c.integers:
            feeds[str(one.name)] = np.zeros(shape, np.float32)
        elif str(one.name).endswith("mask"):
            share = np.linspace(1, 0.2, texts)[:, None]
            feeds[str(one.name)] = (generator.random(shape) < share).astype(np.int64)
        else:
            known = generator.random(shape) < 0.5
            feeds[str(one.name)] = np.where(known, generator.choice(near, shape), generator.integers(0, limit, shape))
    return feeds


def _evaluated(c: EncoderCompiler, value: ir.Value | None, feeds: dict[str, Array]) -> Array:
    if value is None:
        raise NotExpressible("an index that is missing")
    if value in c.integers:
        return feeds[str(value.name)]
    try:
        (found,) = evaluate(c.graph, [value], feeds)
    except Exception as error:  # onnxruntime's errors share no base of their own
        raise NotExpressible(f"'{value.name}', which cannot be evaluated ({str(error).splitlines()[0]})") from None
    return found
