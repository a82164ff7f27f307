"""Blockwise weight quantisation: the arithmetic and the bit layout of MatMulNBits and GatherBlockQuantized.

A weight row of K values is cut into blocks; each block has one scale (and, if asymmetric, one zero point) and its values are
stored as unsigned codes: w ≈ (code − zero) · scale, zero = 2^(bits−1) when symmetric.
Layout: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Scheme = Literal["mse", "absmax"]

BLOCK_SIZES = (16, 32, 64, 128)
_CHUNK = 1 << 22
"""Weights quantised at a time: bounds the working memory (a few copies of this many floats)."""
_SHRINK = (1.0, 0.93, 0.86, 0.79)
"""Clipping factors tried per block by the `mse` scheme."""


@dataclass(slots=True, frozen=True)
class BlockFormat:
    """How weights are stored: 4 or 8 bits, weights per scale, symmetric or with zero points, and how scales are chosen.

    `absmax` maps the largest magnitude to the last code. `mse` picks, per 4-bit block, the scale of least squared error among
    clipped candidates of both signs (a negative scale puts the extreme value on code 0, which is one step further from
    zero than code 15), each refined by least squares for its rounding. For 8 bits both are the same to within noise, and
    absmax is used.
    """

    bits: Literal[4, 8] = 4
    block_size: int = 32
    symmetric: bool = True
    scheme: Scheme = "mse"
    positive: bool = False
    """Only positive scales: what TensorRT takes."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.block_size not in BLOCK_SIZES:
            raise ValueError(f"bits must be 4 or 8 and block_size one of {BLOCK_SIZES}; found {self.bits} and {self.block_size}.")

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    def blocks(self, width: int) -> int:
        """Blocks per row of `width` weights (the last one padded)."""
        return -(-width // self.block_size)


def blocked(weight: Floats, block_size: int) -> Floats:
    """[rows, width] → [rows, blocks, block_size], padded with zeros."""
    rows, width = weight.shape
    padded = -(-width // block_size) * block_size
    if padded != width:
        weight = np.pad(weight, ((0, 0), (0, padded - width)))
    return np.ascontiguousarray(weight, np.float32).reshape(rows, padded // block_size, block_size)


def row_chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows that hold about `_CHUNK` weights each."""
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def choose_scales(weight: Floats, form: BlockFormat) -> tuple[Floats, Codes | None]:
    """Scales [rows, blocks] of a weight [rows, width], and zero points [rows, blocks] when asymmetric.

    A block of zeros gets scale 1. Raises ValueError for a weight with NaN or infinity.
    """
    rows, width = weight.shape
    scales = np.empty((rows, form.blocks(width)), np.float32)
    zeros = None if form.symmetric else np.empty(scales.shape, np.uint8)
    for part in row_chunks(rows, width):
        block = blocked(weight[part], form.block_size)
        if not np.isfinite(block).all():
            raise ValueError("the weight has NaN or infinite values: it cannot be quantised")
        if zeros is not None:
            scales[part], zeros[part] = _asymmetric(block, form)
        elif form.scheme == "mse" and form.bits == 4:
            scales[part] = _least_squares(block, form)
        else:
            scales[part] = _nonzero(np.abs(block).max(-1) / (form.levels // 2 - 1))
    return scales, zeros


def quantize(weight: Floats, scales: Floats, zeros: Codes | None, form: BlockFormat) -> Codes:
    """Codes [rows, blocks, block_size] of a weight [rows, width]; padding holds the code of zero."""
    rows, width = weight.shape
    codes = np.empty((rows, form.blocks(width), form.block_size), np.uint8)
    for part in row_chunks(rows, width):
        block = blocked(weight[part], form.block_size) / scales[part][..., None]
        zero = form.levels // 2 if zeros is None else zeros[part][..., None].astype(np.float32)
        codes[part] = np.clip(np.rint(block) + zero, 0, form.levels - 1)
    return codes


def dequantize(codes: Codes, scales: Floats, zeros: Codes | None, form: BlockFormat, width: int) -> Floats:
    """The weight [rows, width] that the codes stand for."""
    zero = np.float32(form.levels // 2) if zeros is None else zeros[..., None].astype(np.float32)
    values = (codes.astype(np.float32) - zero) * scales[..., None]
    return np.ascontiguousarray(values.reshape(codes.shape[0], -1)[:, :width])


def pack(codes: Codes, bits: int) -> Codes:
    """Codes along the last axis → bytes: two 4-bit codes per byte, the first in the low half; an odd one is padded with 0."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), np.uint8)


def unpack(packed: Codes, bits: int) -> Codes:
    """The inverse of `pack` (an even number of codes)."""
    if bits == 8:
        return packed
    return np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _nonzero(scale: npt.NDArray[np.floating]) -> Floats:
    return np.where(np.abs(scale) > np.finfo(np.float32).tiny, scale, np.float32(1)).astype(np.float32)


def _asymmetric(block: Floats, form: BlockFormat) -> tuple[Floats, Codes]:
    low, high = np.minimum(block.min(-1), 0), np.maximum(block.max(-1), 0)  # zero stays exact
    scale = _nonzero((high - low) / (form.levels - 1))
    zero = np.clip(np.rint(-low / scale), 0, form.levels - 1).astype(np.uint8)
    return scale, zero


def _least_squares(block: Floats, form: BlockFormat) -> Floats:
    """Per block, the scale of least squared error among the candidates (see BlockFormat)."""
    half = form.levels // 2
    where = np.abs(block).argmax(-1)[..., None]
    extreme = np.take_along_axis(block, where, -1)[..., 0]
    best = _nonzero(np.abs(extreme) / (half - 1))
    least = np.full(best.shape, np.inf, np.float32)
    candidates: list[Floats] = [
        (np.abs(extreme) if form.positive else -extreme) * np.float32(1 / half),
        *(np.abs(extreme) * np.float32(shrink / (half - 1)) for shrink in _SHRINK),
    ]
    for start in candidates:
        scale = _nonzero(start)
        code = np.clip(np.rint(block / scale[..., None]), -half, half - 1)
        norm = (code * code).sum(-1)
        dot = (block * code).sum(-1)
        scale = np.where(norm > 0, _nonzero(dot / np.maximum(norm, 1)), scale)
        # Rounding with the refined scale can only lower the error that this one promises.
        error = np.square(block - np.clip(np.rint(block / scale[..., None]), -half, half - 1) * scale[..., None]).sum(-1)
        better = error < least
        least, best = np.where(better, error, least), np.where(better, scale, best)
    return best.astype(np.float32)
