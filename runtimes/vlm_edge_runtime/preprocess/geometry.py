"""Sizes in, sizes out: how each image processor chooses the size it resizes an image to. All pairs are (height, width)."""

from __future__ import annotations

import math

from vlm_edge_runtime.errors import ImageError

IDEFICS3_MAX_SIDE = 4096
"""Idefics3 never resizes beyond this, whatever its `size` says."""

_QWEN_MAX_ASPECT = 200


def shortest_edge_size(height: int, width: int, shortest: int) -> tuple[int, int]:
    """The shorter side becomes `shortest`, the longer one follows (rounded down)."""
    if width <= height:
        return int(shortest * height / width), shortest
    return shortest, int(shortest * width / height)


def bounded_edges_size(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """The shorter side becomes `shortest`, or less where the longer one would exceed `longest` (DETR's rule)."""
    short: float = shortest
    small, large = float(min(height, width)), float(max(height, width))
    if large / small * shortest > longest:
        short = longest * small / large
        shortest = round(short)
    if (height <= width and height == shortest) or (width <= height and width == shortest):
        return height, width
    if width < height:
        return int(short * height / width), shortest
    return shortest, int(short * width / height)


def fit_inside_size(height: int, width: int, max_height: int, max_width: int) -> tuple[int, int]:
    """The largest size with the same aspect ratio inside (max_height, max_width); small images grow."""
    scale = min(max_height / height, max_width / width)
    return int(height * scale), int(width * scale)


def longest_edge_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """Idefics3: the longer side becomes `longest`, the shorter one is rounded up to an even number; at most 4096 a side."""
    aspect = width / height
    if width >= height:
        width = longest
        height = int(width / aspect)
        height += height % 2
    else:
        height = longest
        width = int(height * aspect)
        width += width % 2
    height, width = max(height, 1), max(width, 1)

    aspect = width / height
    if width >= height and width > IDEFICS3_MAX_SIDE:
        width = IDEFICS3_MAX_SIDE
        height = int(width / aspect)
    elif height > width and height > IDEFICS3_MAX_SIDE:
        height = IDEFICS3_MAX_SIDE
        width = int(height * aspect)
    return max(height, 1), max(width, 1)


def tiling_size(height: int, width: int, tile: int) -> tuple[int, int]:
    """Idefics3: both sides rounded up to multiples of the tile, the shorter one after following the longer one."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    return height, width


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Qwen2-VL: both sides multiples of `factor`, the area between the bounds, the aspect ratio nearly kept.

    Raises ImageError where one side is more than 200 times the other (the model's own limit).
    """
    if max(height, width) / min(height, width) > _QWEN_MAX_ASPECT:
        raise ImageError(f"an image of {width} × {height} has one side more than {_QWEN_MAX_ASPECT} times the other; crop it")
    # Python's round() goes to even on ties; transformers relies on it.
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width
