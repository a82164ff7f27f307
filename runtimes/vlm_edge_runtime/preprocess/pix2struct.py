"""Pix2StructImageProcessor (transformers `models/pix2struct`): as many patches as fit, in the image's own aspect ratio.

Pix2Struct (arXiv 2210.03347, section 2.1). Each image is normalised by its own mean and deviation *before* it is resized, so
resizing works on floats here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from vlm_edge_runtime.errors import UnsupportedModelError

from .base import EncodedImage, ImageProcessor
from .ops import Floats, Pixels
from .options import positive


class Pix2StructImageProcessor(ImageProcessor):
    """→ `flattened_patches` float32 `[patches, 2 + height · width · channels]`: row and column from 1, then the patch's values.

    Without the padding that transformers adds up to `max_patches`: an image brings only its own patches.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": 0.0,  # of each image itself
        "image_std": 1.0,
        "patch_size": {"height": 16, "width": 16},
        "max_patches": 2048,
        "is_vqa": False,
    }
    own_options: ClassVar[frozenset[str]] = frozenset({"patch_size", "max_patches", "is_vqa"})

    def check(self) -> None:
        extra = self.options.extra
        if extra["is_vqa"]:
            raise UnsupportedModelError(
                f"{self.name} draws the question onto the image (is_vqa), which is not supported: use a checkpoint that captions."
            )
        size = extra["patch_size"]
        sides = [size] * 2 if isinstance(size, int) else [size.get(key) for key in ("height", "width")]
        if not all(isinstance(side, int) and side > 0 for side in sides):
            raise UnsupportedModelError(f"patch_size of {self.name} must give 'height' and 'width'; found {size!r}")
        self.patch = (int(sides[0]), int(sides[1]))
        self.most = positive(self.options, "max_patches")

    def encode(self, pixels: Pixels, size: tuple[int, int]) -> EncodedImage:
        values = pixels.astype(np.float32)
        if self.options.do_normalize:
            planes = np.ascontiguousarray(values.transpose(2, 0, 1))  # numpy's sums depend on the order
            deviation = max(float(np.std(planes)), 1 / math.sqrt(planes.size))
            values = np.asarray((values - np.mean(planes)) / np.float32(deviation), dtype=np.float32)
        height, width, channels = values.shape
        rows, columns = patch_grid(height, width, self.patch, self.most)
        high, wide = self.patch
        resized = _resized(values, rows * high, columns * wide)
        patches = resized.reshape(rows, high, columns, wide, channels).transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
        row, column = np.divmod(np.arange(rows * columns), columns)
        found = np.concatenate([row[:, None] + 1, column[:, None] + 1, patches], axis=1)
        return EncodedImage({"flattened_patches": found.astype(np.float32)}, size)


def patch_grid(height: int, width: int, patch: tuple[int, int], most: int) -> tuple[int, int]:
    """Rows and columns of patches: at most `most` in all, as near to the image's aspect ratio as whole patches come."""
    scale = math.sqrt(most * (patch[0] / height) * (patch[1] / width))
    rows, columns = (max(min(int(scale * side / own), most), 1) for side, own in ((height, patch[0]), (width, patch[1])))
    return rows, columns


def _resized(values: Floats, height: int, width: int) -> Floats:
    """Bilinear with antialiasing, `[height, width, channels]` float32."""
    rows, columns = _weights(values.shape[0], height), _weights(values.shape[1], width)
    across = np.einsum("oi,hic->hoc", columns, values, optimize=True)
    return np.ascontiguousarray(np.einsum("oi,iwc->owc", rows, across, optimize=True))


def _weights(size: int, target: int) -> Floats:
    """How much each of `size` pixels counts in each of `target`: float32 `[target, size]`, a triangle around its centre.

    Computed in float32 throughout, as PyTorch does: far from the origin its centres are off by some 1e-5 of a pixel.
    """
    scale = np.float32(size) / np.float32(target)
    reach = max(scale, np.float32(1))
    centres = scale * (np.arange(target, dtype=np.float32) + np.float32(0.5))
    distance = (np.arange(size, dtype=np.float32)[None] - centres[:, None] + np.float32(0.5)) / reach
    triangle: Floats = np.maximum(np.float32(1) - np.abs(distance), np.float32(0))
    triangle /= triangle.sum(1, keepdims=True)
    return triangle
