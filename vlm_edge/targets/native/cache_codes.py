"""Caches in 8 bits as the kernels keep them: codes, with a scale for 32 numbers of a head.

The same arithmetic as runtimes/native/kernels/cache_kernels.inc.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .panels import BLOCK

Floats = npt.NDArray[np.float32]


def coded(entries: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Floats [batch, heads, entries, size] as codes of the same shape and their scales [batch, heads · blocks, entries, 1].

    A scale is a block's largest magnitude over 127, rounded up to half precision.
    """
    batch, heads, count, size = entries.shape
    blocks = -(-size // BLOCK)
    padded = np.zeros((batch, heads, count, blocks * BLOCK), np.float32)
    padded[..., :size] = entries
    parts = padded.reshape(batch, heads, count, blocks, BLOCK)
    most = np.abs(parts).max(-1)
    scales = (most / np.float32(127)).astype(np.float16)
    scales = np.where(scales.astype(np.float32) * 127 < most, np.nextafter(scales, np.float16(np.inf)), scales)
    wide = scales.astype(np.float32)[..., None]
    inverse = np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide > 0)
    codes = np.rint(parts * inverse).astype(np.int8).reshape(padded.shape)[..., :size]
    return np.ascontiguousarray(codes), scales.transpose(0, 1, 3, 2).reshape(batch, heads * blocks, count, 1)


def decoded(codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float16]) -> Floats:
    """What they stand for."""
    batch, heads, count, size = codes.shape
    by_entry = scales.reshape(batch, heads, -(-size // BLOCK), count).transpose(0, 1, 3, 2).astype(np.float32)
    return codes.astype(np.float32) * np.repeat(by_entry, BLOCK, axis=-1)[..., :size]
