"""What the host does around vision graphs of images of any size: index arrays before them, features in order after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.bundle.vision_layout import (
    AnyResolutionPlaceholder,
    Geometry,
    InterpolationGeometry,
    MergeGeometry,
    PooledFramesPlaceholder,
    WindowGeometry,
)
from vlm_edge_runtime.errors import BundleError
from vlm_edge_runtime.preprocess import EncodedImage
from vlm_edge_runtime.text.any_resolution import feature_picture

Array = npt.NDArray[np.generic]
Arrays = dict[str, Array]
Ids = npt.NDArray[np.int64]


def geometry_arrays(rules: Sequence[Geometry], layout: EncodedImage) -> Arrays:
    """The index arrays of an image (or of each time step of a video, one after another), by name.

    Raises BundleError when the processor gives no grid of patches.
    """
    arrays: Arrays = {}
    for rule in rules:
        if layout.grid is None:
            raise BundleError(
                "the bundle's image processor gives no grid of patches, which its geometry rules need: export again."
            )
        time, height, width = layout.grid
        for name, array in _GEOMETRY[type(rule)](rule, height, width).items():
            arrays[name] = np.concatenate([array] * time)
    return arrays


def packed(placeholder: object, values: Array, layout: EncodedImage) -> Array:
    """The graphs' features in the order of the image's tokens; as they are where the placeholder has no rule for it."""
    pack = _PACKS.get(type(placeholder))
    return values if pack is None else pack(placeholder, values, layout)


def windows(rule: WindowGeometry, height: int, width: int) -> Arrays:
    """See WindowGeometry; as transformers' `get_vision_window_index`."""
    lines, columns = height // rule.merge, width // rule.merge
    line, column = (each.reshape(-1) for each in np.indices((lines, columns)))
    window = (line // rule.window) * -(-columns // rule.window) + column // rule.window
    tokens = np.lexsort((column, line, window))
    square = rule.merge**2
    return {
        "patch_order": (tokens[:, None] * square + np.arange(square)).reshape(-1),
        "window_ids": np.repeat(window[tokens], square).astype(np.int64),
        "token_order": np.argsort(tokens),
    }


def interpolation(rule: InterpolationGeometry, height: int, width: int) -> Arrays:
    """See InterpolationGeometry; as transformers' `get_vision_interpolation_indices_and_weights`, bilinear."""
    grid = np.indices((height, width)).transpose(1, 2, 0)
    blocks = grid.reshape(height // rule.merge, rule.merge, width // rule.merge, rule.merge, 2).transpose(0, 2, 1, 3, 4)
    line, column = blocks.reshape(-1, 2).T
    (above, low), (before, left) = (_taps(index, size, rule) for index, size in ((line, height), (column, width)))
    return {
        "interpolation_indices": (above[:, :, None] * rule.side + before[:, None, :]).reshape(-1, 4),
        "interpolation_weights": (low[:, :, None] * left[:, None, :]).reshape(-1, 4),
    }


def merge_index(rule: MergeGeometry, height: int, width: int) -> Arrays:
    """See MergeGeometry."""
    patches = np.arange(height * width, dtype=np.int64)
    blocks = patches.reshape(height // rule.merge, rule.merge, width // rule.merge, rule.merge).transpose(0, 2, 1, 3)
    return {"merge_index": blocks.reshape(-1, rule.merge**2)}


def pack_any_resolution(placeholder: AnyResolutionPlaceholder, values: Array, layout: EncodedImage) -> Array:
    """`[tiles, side² + 1, hidden]`, the whole image first → `[tokens, hidden]`; see AnyResolutionPlaceholder."""
    side, hidden = placeholder.side, values.shape[-1]
    base, newline = values[0, :-1], values[0, -1:]
    if not layout.rows:
        return np.concatenate([base, newline])
    picture = feature_picture(side, (layout.rows, layout.columns), layout.size, placeholder.max_tiles)
    tiles = values[1:, :-1].reshape(layout.rows, layout.columns, side, side, hidden).transpose(0, 2, 1, 3, 4)
    features: Array = tiles.reshape(picture.height, picture.width, hidden)
    features = features[picture.top : picture.height - picture.top, picture.left : picture.width - picture.left]
    features = resized(features, picture.lines, picture.columns)
    ends = np.broadcast_to(newline, (picture.lines, 1, hidden))
    return np.concatenate([base, np.concatenate([features, ends], axis=1).reshape(-1, hidden)])


def pack_frames(placeholder: PooledFramesPlaceholder, values: Array, layout: EncodedImage) -> Array:
    """`[frames, tokens + 1, hidden]` → all frames' features and one row that ends them; see PooledFramesPlaceholder."""
    side, hidden = placeholder.side, values.shape[-1]
    frames = values[:, :-1].reshape(-1, side, side, hidden)
    half = -(-side // 2)
    pooled = [resized(frame, half, half).reshape(-1, hidden) for frame in frames]
    return np.concatenate([*pooled, values[0, -1:]])


def resized(features: Array, lines: int, columns: int) -> Array:
    """`[height, width, hidden]` float32 → `[lines, columns, hidden]`, bilinear between the middles of features (torch's

    `interpolate(mode="bilinear", align_corners=False)`); as it is where the size does not change.
    """
    for axis, size in ((0, lines), (1, columns)):
        length = features.shape[axis]
        if length == size:
            continue
        at = np.maximum((np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(length / size) - np.float32(0.5), 0)
        low = at.astype(np.int64)
        share = (at - low).astype(np.float32).reshape([-1 if each == axis else 1 for each in range(3)])
        first = np.take(features, low, axis=axis)
        second = np.take(features, np.minimum(low + 1, length - 1), axis=axis)
        features = first * (1 - share) + second * share
    return features


def _taps(index: Ids, size: int, rule: InterpolationGeometry) -> tuple[Ids, npt.NDArray[np.float32]]:
    """The two learned positions nearest to each index on an axis of `size`, and their weights."""
    place = index.astype(np.float32)
    if rule.align_corners:
        place = place * np.float32(rule.side - 1) / np.float32(max(size - 1, 1))
    else:
        place = (place + np.float32(0.5)) * np.float32(rule.side) / np.float32(size) - np.float32(0.5)
    low = np.floor(place)
    raw = low.astype(np.int64)[:, None] + np.arange(2)
    weights = 1 - np.abs(place[:, None] - low[:, None] - np.arange(2, dtype=np.float32))
    return raw.clip(0, rule.side - 1), np.maximum(weights, 0).astype(np.float32)


_GEOMETRY: dict[type, Callable[[Any, int, int], Arrays]] = {
    WindowGeometry: windows,
    InterpolationGeometry: interpolation,
    MergeGeometry: merge_index,
}
_PACKS: dict[type, Callable[[Any, Array, EncodedImage], Array]] = {
    AnyResolutionPlaceholder: pack_any_resolution,
    PooledFramesPlaceholder: pack_frames,
}
