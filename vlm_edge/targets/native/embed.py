"""An embedding of tokens → a plan that is a table: the row of every token, as the graph gives it.

Whatever a graph makes of a token by itself is a row of a table: a stored table, one whose rows are scaled (Gemma), two of which
the second holds the tokens that were added (IDEFICS). So the graph is asked for every token's row, and is left behind where its
rows depend on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from vlm_edge.passes.base import Changes
from vlm_edge.passes.graph import is_weight, rank

from .errors import NotExpressible
from .plan_file import Format, GraphKind, Plan, Step, Value, Weight

_CHUNK_NUMBERS = 1 << 22
_MOST_HALF = float(np.finfo(np.float16).max)
_LOOKED_AT = 64
"""Tokens whose rows are compared with what the graph gives them among others."""

Floats = npt.NDArray[np.float32]
Run = Callable[[npt.NDArray[np.int64]], Floats]


def embedding_plan(model: ir.Model, precision: str, run: Run) -> tuple[Plan, Changes]:
    """The plan of a portable embedding `[batch, sequence] → [batch, sequence, hidden]` with its rows stored in `precision`.

    `fp16` and `fp32` are floats (fp16 only where all of them are in its range), `int8` has a scale for each row: rows · 1/127 of
    the row's largest number, which leaves an error of at most 1/254 of it. `run`: the graph on token ids.
    Raises NotExpressible for anything else, and for rows that depend on more than their token.
    """
    value, result = _signature(model)
    count, width = _rows(model), int(result.shape[2])
    formats = {"fp32": Format.VECTOR, "fp16": Format.HALF_ROWS, "int8": Format.BYTE_ROWS}
    if precision not in formats:
        raise NotExpressible(f"rows of an embedding in {precision}")
    _check_alone(run, count)
    form, changes = formats[precision], Changes("embedding_rows")
    chunk = max(_CHUNK_NUMBERS // width, 1)
    if form == Format.HALF_ROWS and any(not np.abs(part).max() <= _MOST_HALF for part in _parts(run, count, chunk)):
        form = Format.VECTOR
        changes.note("its rows stay fp32: some of their numbers are beyond fp16")
    table = _table(form, count, width, lambda: _parts(run, count, chunk))
    step = Step(GraphKind.COPY, width, weights=[table])
    changes.add(f"rows in {form.name.lower()}", count)
    return Plan([value], [result], width, count, 0, [step], rows=True), changes


def graph_rows(path: str) -> Run:
    """A stored embedding graph as ONNX Runtime runs it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda ids: np.asarray(session.run(None, {name: ids})[0], np.float32)


def _signature(model: ir.Model) -> tuple[Value, Value]:
    inputs, outputs = model.graph.inputs, model.graph.outputs
    if len(inputs) != 1 or len(outputs) != 1 or inputs[0].dtype != ir.DataType.INT64 or outputs[0].dtype != ir.DataType.FLOAT:
        raise NotExpressible("an embedding that is not int64 tokens into float32 rows")
    named = [
        tuple(one if isinstance(one, int) else str(one.value) for one in value.shape or ()) for value in (inputs[0], outputs[0])
    ]
    if len(named[0]) != 2 or len(named[1]) != 3 or named[0] != named[1][:2] or not isinstance(named[1][2], int):
        raise NotExpressible(f"an embedding of {named[0]} into {named[1]}")
    if any(isinstance(size, int) for size in named[0]):
        raise NotExpressible(f"an embedding for {named[0]} tokens only")
    return Value(str(inputs[0].name), int(ir.DataType.INT64), named[0]), Value(
        str(outputs[0].name), int(ir.DataType.FLOAT), named[1]
    )


def _rows(model: ir.Model) -> int:
    """How many tokens the graph has rows for: those of all stored tables that it takes rows of by tokens, one after another."""
    tables = {
        node.inputs[0]
        for node in model.graph
        if node.op_type == "Gather" and not node.domain and is_weight(node.inputs[0]) and rank(node.inputs[0]) == 2
    }
    sizes = [int(table.shape[0]) for table in tables if table is not None and table.shape is not None]  # type: ignore[arg-type]
    if not sizes:
        raise NotExpressible("an embedding without a stored table")
    return sum(sizes)


def _check_alone(run: Run, count: int) -> None:
    """Rows must be those that a token has alone, whatever stands before, after and beside it, and in whatever order."""
    ids = np.random.default_rng(0).integers(0, count, _LOOKED_AT)
    ids[:2] = 0, count - 1
    try:
        among = run(ids.reshape(2, -1)).reshape(_LOOKED_AT, -1)
        alone = np.concatenate([run(ids[i : i + 1, None])[:, 0] for i in range(_LOOKED_AT)])
    except Exception as error:  # ONNX Runtime's own classes, none of which it promises
        raise NotExpressible(f"an embedding that does not take the tokens 0 … {count - 1} ({str(error)[:200]})") from error
    if not np.array_equal(among, alone):
        raise NotExpressible("an embedding whose rows depend on more than their token")


def _parts(run: Run, count: int, chunk: int) -> Iterator[Floats]:
    for first in range(0, count, chunk):
        yield run(np.arange(first, min(first + chunk, count), dtype=np.int64)[None])[0]


def _table(form: Format, count: int, width: int, parts: Callable[[], Iterator[Floats]]) -> Weight:
    dtype: np.dtype[Any]
    pack: Callable[[Floats], npt.NDArray[Any]]
    if form == Format.BYTE_ROWS:
        stride, dtype, pack = 4 + -(-width // 4) * 4, np.dtype(np.uint8), _byte_rows
    else:
        dtype = np.dtype(np.float16 if form == Format.HALF_ROWS else np.float32)
        stride, pack = width, lambda rows: rows.astype(dtype)

    def make() -> npt.NDArray[np.generic]:
        table = np.empty((count, stride), dtype)
        first = 0
        for rows in parts():
            table[first : first + len(rows)] = pack(rows)
            first += len(rows)
        return table

    return Weight(form, count, width, count * stride * dtype.itemsize, make)


def _byte_rows(rows: Floats) -> npt.NDArray[np.uint8]:
    """Each row as its scale (float32) and its codes in 8 bits, filled up to whole fours."""
    scales = np.abs(rows).max(axis=1, keepdims=True) / 127
    codes = np.rint(rows / np.where(scales > 0, scales, 1)).astype(np.int8)
    filled = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 4)))
    return np.concatenate([scales.astype(np.float32).view(np.uint8), filled.view(np.uint8)], axis=1)
