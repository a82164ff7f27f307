"""Pixel arithmetic on uint8 `[height, width, channels]`: the one place where numpy and Pillow give way to native code.

What native code replaces it must equal: resizing integer for integer, normalisation bit for bit. The definitions are those of
transformers' PIL image processors (`image_transforms.py`), which are Pillow's resampling and numpy's float arithmetic.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlm_edge_runtime.errors import ImageError

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

RESAMPLE_NAMES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's `Resampling` numbers, as `preprocessor_config.json` stores them."""

# A sliver of 8000 × 1 whose shorter side is brought to 224 would take 1.2 GB.
_MAX_RESIZED_PIXELS = 1 << 27
_OWN_PAGES = 4 << 20


def _import_native() -> ModuleType | None:
    try:
        module = import_module("vlm_edge_runtime._native")
    except ModuleNotFoundError:
        # Pure-Python installs and tests compare against this path; a library that is there but broken still raises.
        return None
    return module


native: ModuleType | None = _import_native()


@cache
def _threads() -> int:
    """Threads that native code shares an image's lines out to."""
    from vlm_edge_runtime.engines.threads import default_threads

    return default_threads()


@dataclass(frozen=True, slots=True)
class Patches:
    """How frames are cut up: squares of `size` pixels, `depth` frames deep, those of a merge × merge block next to each other."""

    size: int
    merge: int = 1
    depth: int = 1


def resize(pixels: Pixels, size: tuple[int, int], resample: int) -> Pixels:
    """Resized to `size` = (height, width) with Pillow's antialiasing filter number `resample` (see RESAMPLE_NAMES)."""
    height, width, channels = pixels.shape
    if min(size) < 1 or size[0] * size[1] > _MAX_RESIZED_PIXELS:
        raise ImageError(
            f"an image of {width} × {height} would become {size[1]} × {size[0]}; its aspect ratio is too extreme, crop it"
        )
    if channels in (1, 3) and height > size[0] and height - size[0] > 2 * (width - size[1]):
        # Where the height shrinks by much more than the width Pillow 13 works on the columns first, which rounds differently.
        # Spelt out here so that neither an older Pillow nor native code changes the result.
        pixels = _resample(pixels, (size[0], width), resample)
    return _resample(pixels, size, resample)


def _resample(pixels: Pixels, size: tuple[int, int], resample: int) -> Pixels:
    """Both passes, rows before columns."""
    height, width, channels = pixels.shape
    if (height, width) == size:
        return pixels
    # Nearest is another algorithm, and Pillow multiplies alpha in first: both stay with Pillow.
    if native is not None and resample != 0 and channels in (1, 3):
        resized = _pixels((*size, channels))
        native.resize_u8(_whole_pixels(pixels), resized, RESAMPLE_NAMES[resample], threads=_threads())
        return resized
    squeezed = np.ascontiguousarray(pixels[..., 0] if channels == 1 else pixels)
    return np.asarray(Image.fromarray(squeezed).resize((size[1], size[0]), Image.Resampling(resample))).reshape(*size, channels)


def _pixels(shape: tuple[int, int, int]) -> Pixels:
    """Pixels that nothing was written to. Large images (SmolVLM brings a small one to 2048 × 2048 first) have pages of their own,

    which go back to the system with them: freed memory of this size would stay with the process while the encoder runs.
    """
    count = math.prod(shape)
    if count < _OWN_PAGES:
        return np.empty(shape, np.uint8)
    if sys.platform != "linux":
        return np.frombuffer(mmap.mmap(-1, count), np.uint8).reshape(shape)
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8).reshape(shape)


def _whole_pixels(pixels: Pixels) -> Pixels:
    """As native code takes an image: its lines may lie apart, as those of a tile do, but not its pixels; else a copy."""
    _, width, channels = pixels.shape
    if pixels.strides[1:] == (channels, 1) and pixels.strides[0] >= width * channels:
        return pixels
    return np.ascontiguousarray(pixels)


def center_crop(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """The middle `size` = (height, width); where the image is smaller it is first padded with zeros on both sides."""
    height, width = pixels.shape[:2]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    if top >= 0 and left >= 0:
        return pixels[top : top + size[0], left : left + size[1]]
    canvas_height, canvas_width = max(size[0], height), max(size[1], width)
    canvas = np.zeros((canvas_height, canvas_width, pixels.shape[2]), np.uint8)
    # The odd pixel of padding goes before the image, as in transformers.
    top_pad, left_pad = math.ceil((canvas_height - height) / 2), math.ceil((canvas_width - width) / 2)
    canvas[top_pad : top_pad + height, left_pad : left_pad + width] = pixels
    top, left = top + top_pad, left + left_pad
    return canvas[max(0, top) : top + size[0], max(0, left) : left + size[1]]


def pad_to_square(pixels: Pixels, background: Sequence[int]) -> Pixels:
    """Centred on a square of the longer side, filled with `background` per channel (LLaVA's `expand2square`)."""
    height, width, channels = pixels.shape
    if height == width:
        return pixels
    side = max(height, width)
    square = np.empty((side, side, channels), np.uint8)
    square[:] = np.asarray(background, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def pad_bottom_right(planes: Floats, size: tuple[int, int]) -> Floats:
    """`[channels, height, width]` extended with zeros below and to the right to `size` = (height, width)."""
    _, height, width = planes.shape
    if size[0] < height or size[1] < width:
        raise ImageError(f"the image is {width} × {height}, larger than the processor's pad_size {size[1]} × {size[0]}")
    return np.pad(planes, ((0, 0), (0, size[0] - height), (0, size[1] - width)))


def normalize(
    frames: Sequence[Pixels],
    scale: float,
    mean: Sequence[float],
    std: Sequence[float],
    patches: Patches | None = None,
    out: Floats | None = None,
) -> Floats:
    """Frames of one size → float32 (float32(pixel · scale) − mean) / std, one mean and std for each channel.

    The product is taken in float64 and rounded once, difference and quotient in float32, as transformers' `rescale` and
    `normalize` do one after the other. Returns `[frames, channels, height, width]`, or what `cut` makes of it; in `out`, where
    that is given (contiguous, of that shape).
    """
    height, width, channels = frames[0].shape
    shape = (len(frames), channels, height, width) if patches is None else _cut_shape(frames, patches)
    if out is None:
        out = np.empty(shape, np.float32)
    if native is not None and channels <= 4:
        cut_up = (0, 1, 1) if patches is None else (patches.size, patches.merge, patches.depth)
        native.normalize_u8([_whole_pixels(frame) for frame in frames], scale, mean, std, out, *cut_up, threads=_threads())
        return out
    scaled = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)
    # There are only 256 inputs per channel: compute each once, with the same arithmetic.
    tables = (scaled[None, :] - np.asarray(mean, np.float32)[:, None]) / np.asarray(std, np.float32)[:, None]
    planes = np.stack([[table[frame[..., channel]] for channel, table in enumerate(tables)] for frame in frames])
    out[:] = planes if patches is None else cut(planes, patches)
    return out


def cut(frames: Floats, patches: Patches) -> Floats:
    """`[frames, C, H, W]` → `[steps · rows · columns, C · depth · size²]`; the last frame fills up the last time step.

    The patches of a block stand next to each other, blocks in reading order. Both sides must be multiples of a block's.
    """
    size, merge, depth = patches.size, patches.merge, patches.depth
    frames = np.concatenate([frames, *[frames[-1:]] * (-len(frames) % depth)])
    count, channels, height, width = frames.shape
    rows, columns = height // size, width // size
    blocks = frames.reshape(count // depth, depth, channels, rows // merge, merge, size, columns // merge, merge, size)
    # → step, block row, block column, row in block, column in block, channel, frame, patch row, patch column
    blocks = blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return blocks.reshape(count // depth * rows * columns, channels * depth * size * size)


def _cut_shape(frames: Sequence[Pixels], patches: Patches) -> tuple[int, int]:
    height, width, channels = frames[0].shape
    squares = (height // patches.size) * (width // patches.size)
    return -(-len(frames) // patches.depth) * squares, channels * patches.depth * patches.size**2
