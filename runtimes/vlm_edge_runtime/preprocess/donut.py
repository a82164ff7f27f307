"""DonutImageProcessor (transformers `models/donut`): a whole page inside a fixed frame (arXiv 2111.15664, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from vlm_edge_runtime.errors import ImageError, UnsupportedModelError

from .base import EncodedImage, FixedSizeProcessor
from .geometry import shortest_edge_size
from .ops import Pixels, center_crop, resize
from .options import HALF


class DonutImageProcessor(FixedSizeProcessor):
    """Turn the page where its long side lies across the frame's, bring it inside the frame, black around it, normalise."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "do_resize": True,
        "size": {"height": 2560, "width": 1920},
        "resample": 2,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": HALF,
        "image_std": HALF,
        "do_pad": True,
        "do_thumbnail": True,
        "do_align_long_axis": False,
    }
    own_options: ClassVar[frozenset[str]] = frozenset({"do_thumbnail", "do_align_long_axis"})

    def prepare(self, config: dict[str, Any]) -> dict[str, Any]:
        # Older files give (width, height).
        if isinstance(size := config.get("size"), (list, tuple)):
            config["size"] = list(size)[::-1]
        return config

    def check(self) -> None:
        size = self.options.size
        if not (size.height and size.width):
            raise UnsupportedModelError(f"size of {self.name} must give 'height' and 'width'; found {size}")
        self.frame = (size.height, size.width)
        if self.options.do_center_crop:
            super().check()

    def encode(self, pixels: Pixels, size: tuple[int, int]) -> EncodedImage:
        options, (high, wide) = self.options, self.frame
        height, width, _ = pixels.shape
        if options.extra["do_align_long_axis"] and ((wide < high and width > height) or (wide > high and width < height)):
            pixels = np.rot90(pixels, 3)
        if options.do_resize:
            height, width, _ = pixels.shape
            pixels = resize(pixels, shortest_edge_size(height, width, min(self.frame)), options.resample)
        if options.extra["do_thumbnail"]:
            pixels = resize(pixels, thumbnail_size(pixels.shape[0], pixels.shape[1], self.frame), options.resample)
        if options.do_pad:
            pixels = self._framed(pixels)
        if options.do_center_crop and (crop := options.crop_size) is not None and crop.height and crop.width:
            pixels = center_crop(pixels, (crop.height, crop.width))
        return EncodedImage({"pixel_values": self.normalize(np.ascontiguousarray(pixels))}, size)

    def _framed(self, pixels: Pixels) -> Pixels:
        """In the middle of the frame; the odd row or column of black is at the end."""
        missing = [frame - side for frame, side in zip(self.frame, pixels.shape, strict=False)]
        if min(missing) < 0:
            raise ImageError(
                f"the image is {pixels.shape[1]} × {pixels.shape[0]}, larger than the frame of {self.frame[1]} × "
                f"{self.frame[0]}; "
                "the options of this processor do not make it smaller: turn do_thumbnail on, or pass a smaller image."
            )
        before = [each // 2 for each in missing]
        return np.pad(pixels, [*((start, each - start) for start, each in zip(before, missing, strict=True)), (0, 0)])


def thumbnail_size(height: int, width: int, frame: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image made no larger than `frame` along its longer side, in its own aspect ratio."""
    high, wide = min(height, frame[0]), min(width, frame[1])
    if (high, wide) == (height, width):
        return high, wide
    if height > width:
        wide = int(width * high / height)
    elif width > height:
        high = int(height * wide / width)
    return high, wide
