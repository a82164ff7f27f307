"""MllamaImageProcessor (transformers `models/mllama`): up to so many square tiles, arranged as the image fits them best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.errors import UnsupportedModelError

from .base import EncodedImage, ImageProcessor
from .ops import Pixels, resize
from .options import HALF


class MllamaImageProcessor(ImageProcessor):
    """An image keeps its aspect ratio on a canvas of tiles; what it does not cover is black, and tiles that it lacks are zero.

    Arrays: `pixel_values` float32 `[1, max_image_tiles, channels, size, size]`, `aspect_ratio_ids` int64 `[1]` (the arrangement,
    counted from 1), `aspect_ratio_mask` int64 `[1, max_image_tiles]` (which tiles there are).
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": 2,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": HALF,
        "image_std": HALF,
        "do_convert_rgb": True,
        "do_pad": True,
        "max_image_tiles": 4,
    }
    own_options: ClassVar[frozenset[str]] = frozenset({"max_image_tiles"})

    def check(self) -> None:
        options = self.options
        if not options.do_resize or not options.do_pad:
            raise UnsupportedModelError(f"{self.name} always resizes and pads; do_resize and do_pad must be true.")
        if not options.size.height or options.size.height != options.size.width:
            raise UnsupportedModelError(f"size of {self.name} must give equal 'height' and 'width'; found {options.size}")
        tiles = options.extra["max_image_tiles"]
        if not isinstance(tiles, int) or tiles < 1:
            raise UnsupportedModelError(f"max_image_tiles of {self.name} must be 1 or more; found {tiles!r}")
        self._tiles, self._side = tiles, options.size.height
        numbers = range(1, tiles + 1)
        self.arrangements = [(rows, columns) for rows in numbers for columns in numbers if rows * columns <= tiles]
        """(rows, columns) of every canvas of at most `max_image_tiles` tiles, in the order of their ids."""

    def encode(self, pixels: Pixels, size: tuple[int, int]) -> EncodedImage:
        side, (height, width, channels) = self._side, pixels.shape
        rows, columns = self._arrangement(height, width)
        fitted = resize(pixels, self._fit(height, width, rows * side, columns * side), self.options.resample)
        canvas = np.zeros((rows * side, columns * side, channels), np.uint8)
        canvas[: fitted.shape[0], : fitted.shape[1]] = fitted
        tiles = [
            canvas[row * side : (row + 1) * side, column * side : (column + 1) * side]
            for row in range(rows)
            for column in range(columns)
        ]
        values = np.zeros((1, self._tiles, channels, side, side), np.float32)
        self.normalize(*tiles, out=values[0, : len(tiles)])
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "pixel_values": values,
            "aspect_ratio_ids": np.array([self.arrangements.index((rows, columns)) + 1], np.int64),
            "aspect_ratio_mask": (np.arange(self._tiles) < rows * columns).astype(np.int64)[None],
        }
        return EncodedImage(arrays, size, rows=rows, columns=columns)

    def _arrangement(self, height: int, width: int) -> tuple[int, int]:
        """The canvas that enlarges the image least, else shrinks it least; of equal ones the smallest."""
        canvases = np.array(self.arrangements) * self._side
        scales = np.minimum(canvases[:, 0] / height, canvases[:, 1] / width)
        enlarging = scales[scales >= 1]
        scale = enlarging.min() if len(enlarging) else scales.max()
        best = min(np.flatnonzero(scales == scale), key=lambda i: int(canvases[i].prod()))
        return self.arrangements[int(best)]

    def _fit(self, height: int, width: int, canvas_height: int, canvas_width: int) -> tuple[int, int]:
        """The image's size on the canvas: not larger than it, and at least a tile's side along the edge that decides."""
        target_height = min(max(height, self._side), canvas_height)
        target_width = min(max(width, self._side), canvas_width)
        by_height, by_width = target_height / height, target_width / width
        if by_width < by_height:
            return min(math.floor(height * by_width) or 1, target_height), target_width
        return target_height, min(math.floor(width * by_height) or 1, target_width)
