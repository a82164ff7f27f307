"""Pixel arithmetic on uint8 `[height, width, channels]`: the one place where numpy and Pillow give way to native code.

What native code replaces it must equal: resizing integer for integer, normalisation bit for bit. The definitions are those of
transformers' PIL image processors (`image_transforms.py`), which are Pillow's resampling and numpy's float arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def _import_native() -> ModuleType | None:
    try:
        module = import_module("vlm_edge_runtime._native")
    except ModuleNotFoundError:
        # Pure-Python installs and tests compare against this path; a library that is there but broken still raises.
        return None
    return module


native: ModuleType | None = _import_native()


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
        source = np.ascontiguousarray(pixels)
        content = native.resize_u8(source, height, width, channels, *size, RESAMPLE_NAMES[resample])
        return np.frombuffer(content, np.uint8).reshape(*size, channels)
    squeezed = np.ascontiguousarray(pixels[..., 0] if channels == 1 else pixels)
    resized = Image.fromarray(squeezed).resize((size[1], size[0]), Image.Resampling(resample))
    return np.asarray(resized).reshape(*size, channels)


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


def normalize(pixels: Pixels, scale: float, mean: Sequence[float], std: Sequence[float], out: Floats) -> None:
    """Writes float32 `[channels, height, width]` = (float32(pixel · scale) − mean) / std into `out`, which must be contiguous.

    The product is taken in float64 and rounded once, difference and quotient in float32, as transformers' `rescale` and
    `normalize` do one after the other.
    """
    height, width, channels = pixels.shape
    if native is not None and channels <= 4:
        native.normalize_hwc_u8(np.ascontiguousarray(pixels), height, width, channels, scale, mean, std, out)
        return
    scaled = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)
    # There are only 256 inputs per channel: compute each once, with the same arithmetic.
    tables = (scaled[None, :] - np.asarray(mean, np.float32)[:, None]) / np.asarray(std, np.float32)[:, None]
    for channel in range(channels):
        np.take(tables[channel], pixels[..., channel], out=out[channel])
