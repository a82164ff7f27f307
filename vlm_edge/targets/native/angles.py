"""Rotary angles that a graph computes from positions: found by asking it, whatever way it is written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .errors import NotExpressible
from .probe import part

_TOKENS = 7


@dataclass(slots=True, frozen=True)
class Angles:
    """cos and sin of position[axes[i]] · frequencies[i], both times `factor`."""

    frequencies: npt.NDArray[np.float32]
    axes: npt.NDArray[np.int32]
    factor: float


def rotary_angles(model: ir.Model, cosine: ir.Value, sine: ir.Value, axes: int) -> Angles:
    """The angles behind two tables [batch, sequence, half] that depend on `position_ids` alone.

    Each column turns with one axis of the position (M-RoPE: time, height or width) at one frequency; both are read off
    from what the graph gives where one axis is 1 and the others 0, and the result is compared on random positions. Raises
    NotExpressible for tables that are something else.
    """
    session = part(model, [cosine, sine], ["position_ids"])

    def tables(positions: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        fed = positions.reshape(1, _TOKENS) if axes < 2 else positions.reshape(axes, 1, _TOKENS)
        found = session.run(None, {"position_ids": fed})
        half = found[0].shape[-1]
        if any(one.size != _TOKENS * half for one in found):
            raise NotExpressible(f"rotary tables of shape {found[0].shape}")
        return found[0].reshape(_TOKENS, half).astype(np.float64), found[1].reshape(_TOKENS, half).astype(np.float64)

    count = max(axes, 1)
    start_cos, start_sin = tables(np.zeros((count, _TOKENS), np.int64))
    factor = float(start_cos[0, 0])
    if not np.allclose(start_cos, factor) or not np.allclose(start_sin, 0) or factor <= 0:
        raise NotExpressible("rotary tables that do not begin at angle 0")
    turned = np.stack([_phases(*tables(_along(count, axis, 1))) for axis in range(count)])
    owner = np.abs(turned).argmax(0)
    exact = np.take_along_axis(turned, owner[None], 0)[0]
    for step in 2 ** np.arange(1, 13):  # what further positions turn by, beyond what was expected, sharpens the frequency
        found = np.stack([_phases(*tables(_along(count, axis, int(step)))) for axis in range(count)])
        off = np.take_along_axis(found, owner[None], 0)[0] - exact * step
        exact = exact + np.angle(np.exp(1j * off)) / step
    frequencies = exact.astype(np.float32)
    random = np.random.default_rng(0).integers(0, 200, (count, _TOKENS))
    cos, sin = tables(random)
    phase = random[owner].T * frequencies.astype(np.float64)
    # Positions times float32 frequencies: 200 · 2^-24 of angle, and the tables' own rounding.
    if not np.allclose(cos, np.cos(phase) * factor, atol=1e-4) or not np.allclose(sin, np.sin(phase) * factor, atol=1e-4):
        raise NotExpressible("rotary tables that are not one frequency of one axis in each column")
    return Angles(frequencies, owner.astype(np.int32), factor)


def _along(axes: int, axis: int, position: int) -> npt.NDArray[np.int64]:
    positions = np.zeros((axes, _TOKENS), np.int64)
    positions[axis] = position
    return positions


def _phases(cosine: npt.NDArray[np.float64], sine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(np.arctan2(sine[0], cosine[0]), np.float64)
