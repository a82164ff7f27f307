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


def best_resolution(height: int, width: int, choices: list[tuple[int, int]]) -> tuple[int, int]:
    """LLaVA-NeXT: of some sizes, the one in which most of the image's pixels survive; of equals, the one with the least waste."""

    def quality(choice: tuple[int, int]) -> tuple[int, int]:
        scale = min(choice[1] / width, choice[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - choice[0] * choice[1]

    return max(choices, key=quality)


def fit_resolution(height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
    """The largest size with the same aspect ratio inside `target`; one side fills it, the other is rounded up."""
    across, down = target[1] / width, target[0] / height
    if across < down:
        return min(math.ceil(height * across), target[0]), target[1]
    return target[0], min(math.ceil(width * down), target[1])


def tile_arrangement(height: int, width: int, tile: tuple[int, int], least: int, most: int) -> tuple[int, int]:
    """InternVL: (rows, columns) of between `least` and `most` tiles, nearest to the image's aspect ratio.

    Of equally near ones the last that the image fills more than half, counted by number of tiles, then by columns.
    """
    sides = range(1, most + 1)
    choices = sorted(
        ((columns, rows) for columns in sides for rows in sides if least <= columns * rows <= most),
        key=lambda one: one[0] * one[1],
    )
    best, nearest = (1, 1), math.inf
    for columns, rows in choices:
        distance = abs(width / height - columns / rows)
        half_full = height * width > 0.5 * tile[0] * tile[1] * columns * rows
        if distance < nearest or (distance == nearest and half_full):
            best, nearest = (columns, rows), distance
    return best[1], best[0]


def least_scaled_arrangement(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """Command A Vision: (rows, columns) of at most `most` tiles that an image must be enlarged least to fit into, whole.

    Where all are too small, the one that it must be shrunk least for. Of equals the first by number of tiles, then by columns.
    """
    sides = range(1, most + 1)
    choices = sorted(
        ((columns, rows) for columns in sides for rows in sides if columns * rows <= most), key=lambda one: one[0] * one[1]
    )
    scales = [min(columns * side / width, rows * side / height) for columns, rows in choices]
    if max(scales) < 1:
        best = scales.index(max(scales))
    else:
        best = min((index for index, scale in enumerate(scales) if scale >= 1), key=lambda index: scales[index])
    return choices[best][1], choices[best][0]


def whole_patches_size(height: int, width: int, largest: tuple[int, int], patch: int) -> tuple[int, int]:
    """Pixtral: shrunk to fit into `largest` where it does not, then both sides rounded up to multiples of `patch`."""
    ratio = max(height / largest[0], width / largest[1])
    if ratio > 1:
        height, width = math.floor(height / ratio), math.floor(width / ratio)
    return ((height - 1) // patch + 1) * patch, ((width - 1) // patch + 1) * patch
