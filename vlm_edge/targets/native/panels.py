"""Weights in panels of 16 outputs, the order in which the kernels read them (runtimes/native/kernels/kernels.h)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlm_edge.quantize.blockwise import unpack

from .plan_file import Format, Weight

PANEL, BLOCK = 16, 32
_TOP = 8
"""Scales are brought below 2^8: float16 then keeps 22 powers of two below the largest one exactly rounded."""

Rows = Callable[[], npt.NDArray[np.generic]]


@dataclass(slots=True, frozen=True)
class Quantised:
    """A weight of MatMulNBits: codes uint8 [outputs, blocks, bytes of a block] and scales float32 [outputs, blocks].

    Both are given when asked for. `order`: which output stands where (−1: a column of zeros), None as they are.
    """

    bits: int
    block: int
    depth: int
    codes: Rows
    scales: Rows


def quantised(source: Quantised, order: npt.NDArray[np.int64]) -> Weight:
    """The outputs of `order` (−1 where a column is to be zero) as panels."""
    width = len(order)
    panels, blocks, groups = -(-width // PANEL), -(-source.depth // BLOCK), -(-source.depth // source.block)
    pair, code_bytes = 2 * source.block // BLOCK, BLOCK * PANEL * source.bits // 8
    pairs = -(-blocks // pair)
    panel_bytes = pairs * 64 + blocks * code_bytes
    largest = float(np.abs(source.scales()).max(initial=0.0))
    factor = 2.0 ** (math.frexp(largest)[1] - _TOP) if largest > 0 else 1.0

    def make() -> npt.NDArray[np.generic]:
        rows = np.concatenate([order, np.full(panels * PANEL - width, -1)])
        scales = np.asarray(np.where(rows[:, None] >= 0, source.scales()[rows], 0) / factor, np.float16)
        scales = np.ascontiguousarray(scales.reshape(panels, PANEL, groups).transpose(0, 2, 1))
        codes = unpack(np.asarray(source.codes(), np.uint8), source.bits).reshape(len(source.scales()), -1)
        codes = codes[:, : blocks * BLOCK]
        packed: npt.NDArray[np.generic]
        zero = 1 << (source.bits - 1)
        if codes.shape[1] < blocks * BLOCK:
            codes = np.pad(codes, ((0, 0), (0, blocks * BLOCK - codes.shape[1])), constant_values=zero)
        codes = np.where(rows[:, None] >= 0, codes[rows], zero).astype(np.uint8)
        if source.bits == 4:
            halves = codes.reshape(panels, PANEL, blocks, 2, 4, 4)
            packed = (halves[:, :, :, 0] | (halves[:, :, :, 1] << 4)).transpose(0, 2, 3, 1, 4)
        else:
            packed = codes.reshape(panels, PANEL, blocks, 8, 4).transpose(0, 2, 3, 1, 4)
        # Lines of two blocks' scales, each before the codes of those blocks; the last line may be half empty.
        lines = np.zeros((panels, pairs * 2, PANEL), np.float16)
        lines[:, :groups] = scales
        filled = np.zeros((panels, pairs * pair, code_bytes), np.uint8)
        filled[:, :blocks] = packed.reshape(panels, blocks, code_bytes)
        parts = [lines.view(np.uint8).reshape(panels, pairs, 64), filled.reshape(panels, pairs, pair * code_bytes)]
        out = np.concatenate(parts, axis=2).reshape(panels, -1)[:, :panel_bytes]
        return np.ascontiguousarray(out)

    kind = Format.INT4 if source.bits == 4 else Format.INT8
    return Weight(kind, source.depth, width, panels * panel_bytes, make, source.block, factor, panel_bytes)


def floating(depth: int, order: npt.NDArray[np.int64], columns: Rows) -> Weight:
    """The same of float32 columns [inputs, outputs]."""
    width = len(order)
    panels = -(-width // PANEL)
    panel_bytes = depth * PANEL * 4

    def make() -> npt.NDArray[np.generic]:
        rows = np.concatenate([order, np.full(panels * PANEL - width, -1)])
        data = np.asarray(columns(), np.float32)[:, rows] * (rows >= 0)
        return np.ascontiguousarray(data.reshape(depth, panels, PANEL).transpose(1, 0, 2))

    return Weight(Format.FLOAT32, depth, width, panels * panel_bytes, make, 0, 1.0, panel_bytes)


def vector(values: npt.NDArray[np.generic]) -> Weight:
    """A plain float32 vector [n], or table [rows, n]."""
    data = np.ascontiguousarray(np.asarray(values, np.float32).reshape(-1, values.shape[-1]))
    return Weight(Format.VECTOR, data.shape[0], data.shape[1], data.nbytes, lambda: data)


def half_rows(values: npt.NDArray[np.generic]) -> Weight:
    """A table [rows, n] that rows are taken of, in half precision."""
    data = np.ascontiguousarray(values, np.float16)
    return Weight(Format.HALF_ROWS, data.shape[0], data.shape[1], data.nbytes, lambda: data)


def integers(values: npt.NDArray[np.generic]) -> Weight:
    """A plain int32 vector [n]."""
    data = np.ascontiguousarray(values, np.int32)
    return Weight(Format.INTEGERS, 1, data.shape[0], data.nbytes, lambda: data)
