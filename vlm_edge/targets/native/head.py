"""The product that chooses tokens, in 8 bits stored as two planes of 4: greedy decoding reads the lower one of few tokens only.

What reads them, and why that is enough, is in runtimes/native/plan_head.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .builder import Builder
from .panels import BLOCK, PANEL
from .plan_file import BufferKind, Format, Kind, Plan, Step, Unary, Weight

TWO_PLANES = "8 bits in two planes of 4: greedy decoding reads the lower one where the largest logit may be"
_READ = {Format.INT4: "4 bits", Format.INT8: "8 bits, read whole", Format.FLOAT16: "float16", Format.FLOAT32: "float32"}

_LINE = 64
_CODES = BLOCK * PANEL // 2
"""Bytes of a block's halves."""


def split(made: Builder, step: Step) -> bool:
    """Makes the product of `step`, which computes the logits, one of two planes; False where it is none that can be."""
    weight = step.weights[0] if step.kind == Kind.MATMUL and step.weights else None
    plain = step.last and len(step.outputs) == 1 and len(step.inputs) == 1 and step.arguments == [Unary.IDENTITY]
    if weight is None or weight.format != Format.INT8 or not plain or any(step.weights[1:]):
        return False
    upper, table, lower = planes(weight)
    rough = made.floats(-(-weight.width // PANEL))
    step.weights = [upper, None, lower]
    step.outputs = [*step.outputs, rough]
    made.add(Kind.REFINE, step.width, True, [*step.inputs, rough], [step.outputs[0]], [upper, table, lower])
    return True


def read_as(plan: Plan) -> str:
    """How a decoder's plan reads the product that chooses tokens; empty for a plan without one."""
    if any(step.kind == Kind.REFINE for step in plan.steps) and not plan.graph:
        return TWO_PLANES
    for step in plan.steps if not plan.graph else ():
        weight = step.weights[0] if step.kind == Kind.MATMUL else None
        if weight is not None and any(ref and ref.buffer.kind == BufferKind.LOGITS for ref in step.outputs):
            return _READ.get(weight.format, "")
    return ""


def greedy_bytes(plan: Plan) -> int:
    """Bytes of weights that a greedily decoded token reads at least: all but the lower halves of the product that chooses it."""
    lower = [step.weights[2] for step in plan.steps if step.kind == Kind.REFINE and not plan.graph]
    return sum(weight.size for weight in plan.weights if not any(weight is one for one in lower))


def planes(weight: Weight) -> tuple[Weight, Weight, Weight]:
    """A weight of 8 bits as three: upper halves, a matrix of 4 bits; (7.5 · largest scale)² of [blocks, panels]; lower halves."""
    panels, blocks = -(-weight.width // PANEL), -(-weight.depth // BLOCK)
    pair = 2 * weight.block // BLOCK
    panel_bytes = -(-blocks // pair) * _LINE + blocks * _CODES
    parts: dict[str, npt.NDArray[np.generic]] = {}

    def part(name: str) -> Callable[[], npt.NDArray[np.generic]]:
        def make() -> npt.NDArray[np.generic]:
            if name not in parts:
                parts.update(_parts(weight, panels, blocks, pair))
            return parts.pop(name)

        return make

    form = replace(weight, format=Format.INT4, size=panels * panel_bytes, make=part("upper"))
    upper = replace(form, scale=weight.scale * 16.0, panel_bytes=panel_bytes)
    table = Weight(Format.VECTOR, blocks, panels, blocks * panels * 4, part("table"))
    lower = Weight(Format.INTEGERS, panels, blocks * _CODES // 4, panels * blocks * _CODES, part("lower"))
    return upper, table, lower


def _parts(weight: Weight, panels: int, blocks: int, pair: int) -> dict[str, npt.NDArray[np.generic]]:
    data = np.asarray(weight.make()).view(np.uint8).reshape(panels, -1)
    groups = -(-blocks // (pair // 2))
    starts = np.arange(0, blocks, pair) // pair * (_LINE + pair * 2 * _CODES)
    lines = np.stack([data[:, at : at + _LINE] for at in starts], axis=1)
    scales = np.ascontiguousarray(lines).view(np.float16).reshape(panels, -1, PANEL)[:, :groups].copy()
    places = [(block // pair + 1) * _LINE + block * 2 * _CODES for block in range(blocks)]
    codes = np.stack([data[:, at : at + 2 * _CODES] for at in places], axis=1).reshape(panels, blocks, 2, 4, PANEL, 4)
    # A block of zeros may have any scale: none makes its upper halves as right as both.
    filled = np.zeros((panels, groups * (pair // 2), PANEL), bool)
    filled[:, :blocks] = (codes != 128).any(axis=(2, 3, 5))
    scales[~filled.reshape(panels, groups, pair // 2, PANEL).any(axis=2)] = 0
    halves = {"upper": codes >> 4, "lower": codes & 15}
    packed = {name: (half[:, :, 0] | half[:, :, 1] << 4).reshape(panels, blocks, _CODES) for name, half in halves.items()}
    padded = np.zeros((panels, len(starts) * 2, PANEL), np.float16)
    padded[:, :groups] = scales
    pieces: list[npt.NDArray[np.uint8]] = []
    for number in range(len(starts)):
        pieces.append(padded[:, 2 * number : 2 * number + 2].copy().view(np.uint8).reshape(panels, _LINE))
        pieces.append(packed["upper"][:, number * pair : (number + 1) * pair].reshape(panels, -1).astype(np.uint8))
    largest = np.abs(scales.astype(np.float32)).max(axis=2) * weight.scale * 7.5
    table = np.repeat(np.square(largest), pair // 2, axis=1)[:, :blocks].T
    return {
        "upper": np.concatenate(pieces, axis=1),
        "table": np.ascontiguousarray(table, np.float32),
        "lower": np.ascontiguousarray(packed["lower"]),
    }
