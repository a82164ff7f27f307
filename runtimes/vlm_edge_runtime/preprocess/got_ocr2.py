"""GotOcr2ImageProcessor (transformers `models/got_ocr2`), which InternVL and Aya Vision use: tiles in the image's own shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vlm_edge_runtime.errors import UnsupportedModelError

from .base import EncodedImage, ImageProcessor
from .geometry import least_scaled_arrangement, tile_arrangement
from .ops import Pixels, resize
from .options import CLIP_MEAN, CLIP_STD, positive

_ALWAYS_TILING = frozenset({"InternVLProcessor", "AyaVisionProcessor"})
"""Processors that switch `crop_to_patches` on in code, whatever the file says; `max_patches` 1 still makes one tile."""


class GotOcr2ImageProcessor(ImageProcessor):
    """`pixel_values [tiles, C, height, width]`: the image's tiles in reading order, then the whole image; alone if not cut."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "do_resize": True,
        "size": {"height": 384, "width": 384},
        "resample": 3,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
        "crop_to_patches": False,
        "min_patches": 1,
        "max_patches": 12,
    }
    own_options: ClassVar[frozenset[str]] = frozenset({"crop_to_patches", "min_patches", "max_patches"})

    def check(self) -> None:
        size = self.options.size
        if not size.height or not size.width:
            raise UnsupportedModelError(f"size of {self.name} must give 'height' and 'width'; found {size}")
        self.tile = (size.height, size.width)
        self.bounds = (positive(self.options, "min_patches"), positive(self.options, "max_patches"))
        always = self.processor_config.get("processor_class") in _ALWAYS_TILING
        self.tiling = (always or bool(self.options.extra["crop_to_patches"])) and self.bounds[1] > 1

    def encode(self, pixels: Pixels, size: tuple[int, int]) -> EncodedImage:
        options, (tall, wide) = self.options, self.tile
        if not self.tiling:
            frame = resize(pixels, self.tile, options.resample) if options.do_resize else pixels
            return EncodedImage({"pixel_values": self.normalize(frame)}, size)
        rows, columns = self.arrangement(pixels.shape[0], pixels.shape[1])
        whole = resize(pixels, (rows * tall, columns * wide), options.resample)
        frames = [
            whole[row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]
            for row in range(rows)
            for column in range(columns)
        ]
        if len(frames) == 1:
            return EncodedImage({"pixel_values": self.normalize(*frames)}, size)
        frames.append(resize(pixels, self.tile, options.resample))
        return EncodedImage({"pixel_values": self.normalize(*frames)}, size, rows=rows, columns=columns)

    def arrangement(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles for an image of that size."""
        return tile_arrangement(height, width, self.tile, *self.bounds)


class Cohere2VisionImageProcessor(GotOcr2ImageProcessor):
    """Cohere2VisionImageProcessor (transformers `models/cohere2_vision`): tiles that need the least change of size."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **GotOcr2ImageProcessor.defaults,
        "size": {"height": 512, "width": 512},
        "crop_to_patches": True,
        "patch_size": 16,
    }
    own_options: ClassVar[frozenset[str]] = GotOcr2ImageProcessor.own_options | {"patch_size"}

    def arrangement(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles: `min_patches` plays no part, as in the original."""
        return least_scaled_arrangement(height, width, self.tile[0], self.bounds[1])
