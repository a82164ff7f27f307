"""What the host computes around vision graphs is what transformers' own functions give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_window_index

from vlm_edge_runtime.bundle.vision_layout import (
    AnyResolutionPlaceholder,
    InterpolationGeometry,
    MergeGeometry,
    PooledFramesPlaceholder,
    WindowGeometry,
)
from vlm_edge_runtime.errors import BundleError
from vlm_edge_runtime.preprocess import EncodedImage
from vlm_edge_runtime.sessions.packing import geometry_arrays, packed, resized
from vlm_edge_runtime.text import image_tokens

GRIDS = [(1, 1), (1, 5), (3, 2), (4, 4), (7, 9), (8, 3), (13, 6)]
"""In tokens of 2 × 2 patches."""


def _layout(lines: int, columns: int, time: int = 1) -> EncodedImage:
    return EncodedImage({}, (0, 0), grid=(time, 2 * lines, 2 * columns))


@pytest.mark.parametrize(("lines", "columns"), GRIDS)
@pytest.mark.parametrize("window", [1, 2, 4])
def test_windows(lines: int, columns: int, window: int) -> None:
    index, bounds = get_vision_window_index(
        torch.tensor([[1, 2 * lines, 2 * columns]]), spatial_merge_size=2, window_size=window * 2 * 14, patch_size=14
    )
    found = geometry_arrays([WindowGeometry(merge=2, window=window)], _layout(lines, columns))
    np.testing.assert_array_equal(found["patch_order"], (index[:, None] * 4 + torch.arange(4)).reshape(-1).numpy())
    np.testing.assert_array_equal(found["token_order"], torch.argsort(index).numpy())
    changes = np.flatnonzero(np.diff(found["window_ids"])) + 1
    np.testing.assert_array_equal([0, *changes, 4 * lines * columns], bounds.numpy())
    assert len(set(found["window_ids"].tolist())) == len(bounds) - 1


@pytest.mark.parametrize(("lines", "columns"), GRIDS)
@pytest.mark.parametrize(("side", "corners"), [(5, True), (16, True), (16, False)])
def test_interpolated_positions(lines: int, columns: int, side: int, corners: bool) -> None:
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, 2 * lines, 2 * columns]]), side, mode="bilinear", align_corners=corners, spatial_merge_size=2
    )
    found = geometry_arrays([InterpolationGeometry(merge=2, side=side, align_corners=corners)], _layout(lines, columns))
    np.testing.assert_array_equal(found["interpolation_indices"], indices.numpy())
    np.testing.assert_array_equal(found["interpolation_weights"], weights.numpy())
    assert found["interpolation_weights"].dtype == np.float32


def test_merged_patches_and_time_steps() -> None:
    rows = torch.arange(4 * 6, dtype=torch.float32).reshape(1, 1, 4, 6)
    expected = torch.nn.functional.unfold(rows, 2, stride=2)[0].t().long().numpy()
    np.testing.assert_array_equal(geometry_arrays([MergeGeometry(merge=2)], _layout(2, 3))["merge_index"], expected)
    np.testing.assert_array_equal(
        geometry_arrays([MergeGeometry(merge=2)], _layout(2, 3, time=2))["merge_index"], np.concatenate([expected, expected])
    )
    with pytest.raises(BundleError, match="grid of patches"):
        geometry_arrays([MergeGeometry(merge=2)], EncodedImage({}, (1, 1)))


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (300, 20), (20, 300), (64, 64), (1, 500), (97, 31), (333, 334)])
@pytest.mark.parametrize("tiles", [(1, 2), (2, 1), (2, 2), (3, 1), (3, 3), (1, 1)])
@pytest.mark.parametrize("largest", [0, 1, 2, 9])
def test_any_resolution(size: tuple[int, int], tiles: tuple[int, int], largest: int) -> None:
    side, hidden = 4, 8
    values = torch.randn(tiles[0] * tiles[1] + 1, side * side + 1, hidden, generator=torch.Generator().manual_seed(3))
    placeholder = AnyResolutionPlaceholder(image_token="<image>", side=side, max_tiles=largest)
    layout = EncodedImage({}, size, rows=tiles[0], columns=tiles[1])
    try:
        expected = _original(values, size, tiles, largest)
    except RuntimeError:
        return  # nothing is left between the padding, and torch cannot resize that
    found = packed(placeholder, values.numpy(), layout)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
    assert len(found) == image_tokens(placeholder, layout)


def _original(values: torch.Tensor, size: tuple[int, int], tiles: tuple[int, int], largest: int) -> torch.Tensor:
    """`pack_image_features` of both models in one, from their own parts."""
    side = math.isqrt(values.shape[1] - 1)
    newline = values[0, -1]
    picture = values[1:, :-1].view(*tiles, side, side, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
    picture = unpad_image(picture, size)
    _, height, width = picture.shape
    if largest and (ratio := math.sqrt(height * width / (largest * side**2))) > 1.1:
        picture = torch.nn.functional.interpolate(picture[None], [int(height // ratio), int(width // ratio)], mode="bilinear")[0]
    picture = torch.cat([picture, newline[:, None, None].expand(*picture.shape[:-1], 1)], dim=-1)
    return torch.cat([values[0, :-1], picture.flatten(1, 2).t()])


def test_an_image_in_one_piece_and_pooled_frames() -> None:
    values = np.random.default_rng(1).normal(size=(1, 10, 8)).astype(np.float32)
    one = AnyResolutionPlaceholder(image_token="<image>", side=3)
    np.testing.assert_array_equal(packed(one, values, EncodedImage({}, (5, 5))), values[0])
    frames = np.random.default_rng(2).normal(size=(4, 10, 8)).astype(np.float32)
    pooled = PooledFramesPlaceholder(image_token="<video>", side=3)
    found = packed(pooled, frames, EncodedImage({}, (5, 5), rows=3, columns=1))
    grid = torch.from_numpy(frames[:, :-1]).reshape(4, 3, 3, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=[2, 2], mode="bilinear").permute(0, 2, 3, 1).reshape(-1, 8)
    np.testing.assert_allclose(found, np.concatenate([expected.numpy(), frames[0, -1:]]), rtol=0, atol=1e-6)
    assert len(found) == image_tokens(pooled, EncodedImage({}, (5, 5), rows=3, columns=1))


@pytest.mark.parametrize("target", [(1, 1), (2, 7), (9, 9), (5, 3), (12, 31)])
def test_resized(target: tuple[int, int]) -> None:
    picture = torch.randn(9, 7, 5, generator=torch.Generator().manual_seed(5))
    expected = torch.nn.functional.interpolate(picture.permute(2, 0, 1)[None], target, mode="bilinear")[0].permute(1, 2, 0)
    found = resized(picture.numpy(), *target)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)  # places are rounded in float32
