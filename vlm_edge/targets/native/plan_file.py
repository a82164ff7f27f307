"""The file of a plan: what runtimes/native/plan.h and plan_graph.h read. Numbers here are that header's numbers."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

VERSION = 3
"""`PLAN_VERSION` of plan.h, where it says when it changes."""
_MAGIC = b"VLMEPLAN"
_PAGE, _LINE = 4096, 64
_INPUTS, _OUTPUTS, _WEIGHTS, _ARGUMENTS, _REALS = 4, 3, 3, 12, 4


class Kind(IntEnum):
    """What a step does; see `StepKind` in plan.h."""

    QUANTIZE = 1
    MATMUL = 2
    GATED = 3
    NORM = 4
    ANGLES = 5
    ROTARY = 6
    ATTENTION = 7
    COMBINE = 8
    CROSS = 9
    LAST = 10
    UNARY = 11
    ADD = 12
    MULTIPLY = 13
    LOOKUP = 14
    SELECT = 15
    SEEN = 16
    GREATER = 17
    REFINE = 18


class GraphKind(IntEnum):
    """What a step of a graph's plan does; see `GraphKind` in plan_graph.h."""

    COPY = 1
    QUANTIZE = 2
    MATMUL = 3
    NORM = 4
    ATTENTION = 5
    UNARY = 6
    ADD = 7
    MULTIPLY = 8
    CONVERT = 9
    COSINE = 10
    ROTARY = 11
    GATHER = 12
    LENGTH = 13
    SPREAD = 14
    PICK = 15


class Over(IntEnum):
    """What an attention of a graph goes over; see `GraphOver` in plan_graph.h."""

    IMAGE = 0
    ALL = 1
    SEGMENTS = 2


class Unary(IntEnum):
    """Activation functions; see `Unary` in kernels.h."""

    IDENTITY = 0
    SILU = 1
    GELU = 2
    GELU_TANH = 3
    QUICK_GELU = 4
    RELU = 5
    TANH = 6
    SIGMOID = 7


class Format(IntEnum):
    """How a weight is stored: panels of 16 outputs, or plain rows. The last two: tables of plan_rows.h."""

    INT4 = 0
    INT8 = 1
    FLOAT16 = 2
    FLOAT32 = 3
    VECTOR = 4
    INTEGERS = 5
    BYTES = 6
    HALF_ROWS = 7
    BYTE_ROWS = 8


class BufferKind(IntEnum):
    """What a buffer holds, or whose memory it is."""

    FLOATS = 0
    CODES = 1
    EMBEDS = 2
    LOGITS = 3
    INPUT = 4
    OUTPUT = 5
    BYTES = 6


@dataclass(slots=True)
class Value:
    """An input or output of the plan: ONNX element type, dimensions (names for dynamic ones).

    `each`: of a graph, how many rows of the first dimension one image has.
    """

    name: str
    dtype: int
    shape: tuple[int | str, ...]
    each: int = 1


@dataclass(slots=True, eq=False)
class Buffer:
    """Rows of `width` numbers, one per token; `offset` in bytes per token, once it is placed.

    In the plan of a graph: `rows` of them per image, and `offset` per image (of an input or output: its number).
    """

    kind: BufferKind
    width: int
    offset: int = 0
    rows: int = 1

    @property
    def bytes(self) -> int:
        """Of the arena, per token (per image)."""
        if self.kind == BufferKind.FLOATS:
            size = self.width * 4
        elif self.kind == BufferKind.CODES:
            size = -(-self.width // 32) * 40
        elif self.kind == BufferKind.BYTES:
            size = -(-self.width // _LINE) * _LINE + 8
        else:
            return 0
        return -(-size * self.rows // _LINE) * _LINE


@dataclass(slots=True, frozen=True)
class Ref:
    """Part of a buffer's rows, from `column` on."""

    buffer: Buffer
    column: int = 0


@dataclass(slots=True, eq=False)
class Weight:
    """A stored tensor of `depth` inputs and `width` outputs; `make` gives its bytes when they are written."""

    format: Format
    depth: int
    width: int
    size: int
    make: Callable[[], npt.NDArray[np.generic]]
    block: int = 0
    scale: float = 1.0
    panel_bytes: int = 0


@dataclass(slots=True, eq=False)
class Step:
    """One step; places that are not used are None."""

    kind: Kind | GraphKind
    width: int
    last: bool = False
    inputs: list[Ref | None] = field(default_factory=list)
    outputs: list[Ref | None] = field(default_factory=list)
    weights: list[Weight | None] = field(default_factory=list)
    arguments: list[int] = field(default_factory=list)
    reals: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Plan:
    """A whole decoder, or (`graph`) another graph, whose steps are of GraphKind, or (`rows`) an embedding.

    An embedding has one step, whose weight is its table.
    `block_input`: which further input numbers blocks of tokens, −1 for none.
    """

    inputs: list[Value]
    outputs: list[Value]
    hidden: int
    vocab: int
    position_axes: int
    steps: list[Step]
    block_input: int = -1
    graph: bool = False
    rows: bool = False

    @property
    def buffers(self) -> list[Buffer]:
        """Every buffer of the steps, in order of first use."""
        refs = (ref for step in self.steps for ref in (*step.inputs, *step.outputs) if ref is not None)
        return list(dict.fromkeys(ref.buffer for ref in refs))

    @property
    def weights(self) -> list[Weight]:
        """Every weight of the steps, in order of use: the order in which a token reads them."""
        return list(dict.fromkeys(weight for step in self.steps for weight in step.weights if weight is not None))


def place(plan: Plan) -> int:
    """Gives each buffer its place in the arena, where buffers that are never needed together share memory; bytes per token.

    Greedy by size over intervals of life (Pisarchyk and Lee, arXiv 2001.03288, section 5).
    """
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for index, step in enumerate(plan.steps):
        for ref in (*step.inputs, *step.outputs):
            if ref is not None:
                first.setdefault(ref.buffer, index)
                last[ref.buffer] = index
    placed: list[Buffer] = []
    for buffer in sorted(first, key=lambda one: -one.bytes):
        if not buffer.bytes:
            continue
        near = [one for one in placed if first[one] <= last[buffer] and first[buffer] <= last[one]]
        buffer.offset = 0
        for one in sorted(near, key=lambda one: one.offset):
            if one.offset >= buffer.offset + buffer.bytes:
                break
            buffer.offset = max(buffer.offset, one.offset + one.bytes)
        placed.append(buffer)
    return max((one.offset + one.bytes for one in placed), default=0)


def write(plan: Plan, path: Path) -> None:
    """Writes the plan: signature, buffers, weights and steps, then the weights' bytes, page by page."""
    token_bytes = place(plan)
    buffers, weights = plan.buffers, plan.weights
    offsets, end = [], 0
    for weight in weights:
        offsets.append(end)
        end += -(-weight.size // _LINE) * _LINE
    meta = b"".join(
        [
            struct.pack("<I", 2 if plan.rows else int(plan.graph)),
            _values(plan.inputs),
            _values(plan.outputs),
            struct.pack("<IIIiQ", plan.hidden, plan.vocab, plan.position_axes, plan.block_input, token_bytes),
            struct.pack("<I", len(buffers)),
            *(struct.pack("<IIIQ", one.kind, one.width, one.rows, one.offset) for one in buffers),
            struct.pack("<I", len(weights)),
            *(_weight(one, offset) for one, offset in zip(weights, offsets, strict=True)),
            struct.pack("<I", len(plan.steps)),
            *(_step(one, buffers, weights) for one in plan.steps),
        ]
    )
    head = _MAGIC + struct.pack("<II", VERSION, len(meta)) + meta
    with path.open("wb") as file:
        file.write(head)
        start = -(-len(head) // _PAGE) * _PAGE
        for weight, offset in zip(weights, offsets, strict=True):
            file.seek(start + offset)
            data = np.ascontiguousarray(weight.make())
            if data.nbytes != weight.size:
                raise ValueError(f"a weight has {data.nbytes} bytes, {weight.size} were announced")
            file.write(data.tobytes() if data.nbytes < 1 << 20 else data.data)
        file.truncate(start + end)
        file.flush()
        os.fsync(file.fileno())


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data


def _values(values: list[Value]) -> bytes:
    parts = [struct.pack("<I", len(values))]
    for value in values:
        parts += [_text(value.name), struct.pack("<II", value.dtype, len(value.shape))]
        for size in value.shape:
            parts += [
                struct.pack("<q", size if isinstance(size, int) else -value.each),
                _text("" if isinstance(size, int) else size),
            ]
    return b"".join(parts)


def _weight(weight: Weight, offset: int) -> bytes:
    sizes = (weight.format, weight.depth, weight.width, weight.block)
    return struct.pack("<IIIIfQQQ", *sizes, weight.scale, offset, weight.size, weight.panel_bytes)


def _step(step: Step, buffers: list[Buffer], weights: list[Weight]) -> bytes:
    def refs(given: list[Ref | None], count: int) -> list[int]:
        filled = [*given, *[None] * (count - len(given))]
        return [number for ref in filled for number in ((buffers.index(ref.buffer), ref.column) if ref else (-1, 0))]

    chosen = [*step.weights, *[None] * (_WEIGHTS - len(step.weights))]
    numbers = [step.kind, int(step.last), step.width, *refs(step.inputs, _INPUTS), *refs(step.outputs, _OUTPUTS)]
    numbers += [-1 if one is None else weights.index(one) for one in chosen]
    numbers += [*step.arguments, *[0] * (_ARGUMENTS - len(step.arguments))]
    reals = [*step.reals, *[0.0] * (_REALS - len(step.reals))]
    return struct.pack(f"<III{len(numbers) - 3}i{_REALS}f", *numbers, *reals)
