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
_TEXTS, _SMALL = 4, 20
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
    feeds = _drawn(c, np.random.default_rng(0), table.shape[0])
    found = _evaluated(c, indices, feeds)
    for value, buffer in c.integers.items():
        if found.size == feeds[str(value.name)].size and np.array_equal(found.reshape(_TEXTS, -1), feeds[str(value.name)]):
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
    feeds = _drawn(c, np.random.default_rng(0), 2)
    for value, buffer in c.integers.items():
        given, prefix = feeds[str(value.name)], keys - buffer.rows
        given[:, 0] = 1  # what hides everything is compared after a build
        if prefix < 0 or value not in graph_inputs_of([mask]):
            continue
        added = _evaluated(c, mask, feeds)
        seen = np.concatenate([np.ones((_TEXTS, prefix), bool), given != 0], axis=1)[:, None, None]
        for below in (False, True):
            if (not below or rows == keys) and _hides(
                added, np.broadcast_to(seen & causal if below else seen, (_TEXTS, 1, rows, keys))
            ):
                return Sight(value, prefix, below)
    raise NotExpressible("an attention with a mask of an unknown rule")


def _hides(found: Array, seen: npt.NDArray[np.bool_]) -> bool:
    try:
        found, seen = np.broadcast_arrays(found, seen)
    except ValueError:
        return False
    if found.dtype == np.bool_:
        return bool((found == seen).all())
    return bool((found[seen] == 0).all() and (found[~seen] < -1e30).all())


def _pick(c: EncoderCompiler, node: ir.Node) -> None:
    """One row of each text: of the largest number (CLIP's end of text), of a certain one, or the last that is no padding."""
    view, index = c.view(node.inputs[0]), node.inputs[1]
    if attribute_int(node, "batch_dims", 0) or view.ndim != 3 or index is None:
        raise NotExpressible("a GatherND of other than one row of each text")
    rules = [(_LARGEST, 0), (_LAST, 0), *((_EQUAL, number) for number in _numbers(index))]
    inputs = set(graph_inputs_of([index]))
    for value, buffer in c.integers.items():
        if value not in inputs or buffer.rows != view.shape[1]:
            continue
        for rule, number in rules:
            if all(_picks(c, index, value, rule, number, seed) for seed in range(6)):
                out = c.fresh(1, view.shape[2])
                c.add(GraphKind.PICK, view.shape[2], [c.rows_of(view), Ref(buffer)], [out], [], [rule, number])
                c.result(node.outputs[0], out, (1, view.shape[2]))
                return
    raise NotExpressible("a token of each text that is chosen by an unknown rule")


def _picks(c: EncoderCompiler, index: ir.Value, value: ir.Value, rule: int, number: int, seed: int) -> bool:
    generator = np.random.default_rng(seed)
    feeds = _drawn(c, generator, _SMALL)
    name, rows = str(value.name), c.integers[value].rows
    if rule == _LAST:
        feeds[name] = (np.arange(rows) < generator.integers(1, rows + 1, (_TEXTS, 1))).astype(np.int64)
        wanted = feeds[name].sum(axis=1) - 1
    elif rule == _EQUAL:
        feeds[name][feeds[name] == number] += 1
        places = generator.random((_TEXTS, rows)) < 0.3
        places[0] = False  # a text without it
        feeds[name][places] = number
        wanted = places.argmax(axis=1)
    else:
        wanted = feeds[name].argmax(axis=1)
    found = _evaluated(c, index, feeds)
    return found.shape == (_TEXTS, 2) and np.array_equal(found, np.stack([np.arange(_TEXTS), wanted], axis=1))


def _numbers(value: ir.Value) -> list[int]:
    """The whole numbers that a value is computed with."""
    found: dict[int, None] = {}
    todo, seen = [value], set()
    while todo:
        node = todo.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        for one in node.inputs:
            if one is not None and one.const_value is not None and one.const_value.size == 1:
                number = np.asarray(one.const_value.numpy()).reshape(-1)[0]
                if np.issubdtype(number.dtype, np.integer) and abs(int(number)) < 1 << 31:
                    found[int(number)] = None
            elif one is not None:
                todo.append(one)
    return list(found)


def _drawn(c: EncoderCompiler, generator: np.random.Generator, limit: int) -> dict[str, Array]:
    """Inputs of some texts, of whole numbers below `limit`; floats are 0."""
    feeds: dict[str, Array] = {}
    for value in c.graph.inputs:
        shape = (_TEXTS, *c.sized(value)[1:])
        drawn = value in c.integers
        feeds[str(value.name)] = generator.integers(0, limit, shape) if drawn else np.zeros(shape, np.float32)
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
