"""Placeholders of images and videos that become different numbers of tokens, as their processors write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlm_edge_runtime.bundle.vision_layout import (
    AnyResolutionPlaceholder,
    FramedTilesPlaceholder,
    LabelledFramesPlaceholder,
    MarkedTilesPlaceholder,
    PatchRowsPlaceholder,
    PooledFramesPlaceholder,
    TimedFramesPlaceholder,
)
from vlm_edge_runtime.errors import PromptError

from .any_resolution import feature_picture


def _any_resolution(one: AnyResolutionPlaceholder, image: Any) -> int:
    """LlavaNextProcessor and LlavaOnevisionProcessor: the whole image, and the picture of its tiles or the end of one line."""
    if not image.rows:
        return one.side**2 + 1
    return one.side**2 + feature_picture(one.side, (image.rows, image.columns), image.size, one.max_tiles).tokens


def _repeated(tokens: Callable[[Any, Any], int]) -> Callable[[Any, Any], str]:
    return lambda one, image: one.image_token * tokens(one, image)


def _framed_tokens(one: FramedTilesPlaceholder | MarkedTilesPlaceholder, image: Any) -> int:
    return int(one.tokens_per_tile * (image.rows * image.columns + 1))


def _marked_text(one: MarkedTilesPlaceholder, image: Any) -> str:
    """AyaVisionProcessor and Cohere2VisionProcessor."""
    tile = one.soft_token * one.tokens_per_tile + one.tile_end
    tiles = "".join(one.tile.format(number=number) + tile for number in range(1, image.rows * image.columns + 1))
    return f"{one.start}{tiles}{one.whole}{tile}{one.end}"


def _rows(one: PatchRowsPlaceholder, image: Any) -> tuple[int, int]:
    if image.grid is None:
        raise PromptError("the image has no grid of patches; the bundle's image processor does not fit its placeholder rule")
    return image.grid[1] // one.merge, image.grid[2] // one.merge


def _rows_text(one: PatchRowsPlaceholder, image: Any) -> str:
    """PixtralProcessor: the last row's end is the image's."""
    lines, columns = _rows(one, image)
    return one.break_token.join([one.image_token * columns] * lines) + one.end_token


def _pooled_frames(one: PooledFramesPlaceholder, video: Any) -> int:
    """LlavaOnevisionProcessor: half the features along both sides of each frame, and one row at the end."""
    return int(video.tiles * (-(-one.side // 2)) ** 2 + 1)


def _step_tokens(one: TimedFramesPlaceholder, video: Any) -> tuple[int, int]:
    """Time steps, and tokens in each."""
    if video.grid is None or len(video.timestamps) != video.grid[0]:
        raise PromptError("the video has no grid of patches with times; the bundle's video processor does not fit its rule")
    time, height, width = video.grid
    return time, height * width // one.merge_size**2


def _timed_text(one: TimedFramesPlaceholder, video: Any) -> str:
    """Qwen3VLProcessor."""
    _, tokens = _step_tokens(one, video)
    frame = f"{one.start_token}{one.image_token * tokens}{one.end_token}"
    return "".join(f"<{second:.1f} seconds>{frame}" for second in video.timestamps)


def _labelled_text(one: LabelledFramesPlaceholder, video: Any) -> str:
    """InternVLProcessor."""
    frame = f"{one.start_token}{one.frame_token * one.tokens_per_frame}{one.end_token}"
    return "\n".join(f"Frame{number}: {frame}" for number in range(1, video.tiles + 1))


VISION_RULES: dict[type, tuple[Callable[[Any, Any], int], Callable[[Any, Any], str]]] = {
    AnyResolutionPlaceholder: (_any_resolution, _repeated(_any_resolution)),
    FramedTilesPlaceholder: (
        _framed_tokens,
        lambda one, image: f"{one.start_token}{one.image_token * _framed_tokens(one, image)}{one.end_token}",
    ),
    MarkedTilesPlaceholder: (_framed_tokens, _marked_text),
    PatchRowsPlaceholder: (lambda one, image: _rows(one, image)[0] * _rows(one, image)[1], _rows_text),
    TimedFramesPlaceholder: (lambda one, video: _step_tokens(one, video)[0] * _step_tokens(one, video)[1], _timed_text),
    LabelledFramesPlaceholder: (lambda one, video: video.tiles * one.tokens_per_frame, _labelled_text),
    PooledFramesPlaceholder: (_pooled_frames, _repeated(_pooled_frames)),
}
"""For each, how many features one input has, and what it is in the text."""
