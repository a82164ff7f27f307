"""JanusImageProcessor (transformers `models/janus`): longer side to the model's size, on a square of the mean colour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vlm_edge_runtime.errors import UnsupportedModelError

from .base import EncodedImage, ImageProcessor
from .ops import Pixels, pad_to_square, resize
from .options import CLIP_MEAN, CLIP_STD, positive


class JanusImageProcessor(ImageProcessor):
    """`pixel_values [1, 3, size, size]`. A side never falls below `min_size` pixels."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "do_resize": True,
        "size": {"height": 384, "width": 384},
        "resample": 3,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "min_size": 14,
    }
    own_options: ClassVar[frozenset[str]] = frozenset({"min_size", "background_color"})

    def check(self) -> None:
        size = self.options.size
        if self.options.do_resize and (not size.height or size.height != size.width):
            raise UnsupportedModelError(f"size of {self.name} must give equal 'height' and 'width'; found {size}")
        self.smallest = positive(self.options, "min_size")
        mean = self.options.image_mean
        if isinstance(mean, float):
            raise UnsupportedModelError(f"image_mean of {self.name} is a background colour too: give one number per channel")
        # What the file says of the background is computed anew by transformers too.
        self.background = (127, 127, 127) if mean is None else tuple(int(value * 255) for value in mean)

    def encode(self, pixels: Pixels, size: tuple[int, int]) -> EncodedImage:
        if self.options.do_resize:
            height, width, _ = pixels.shape
            scale = (self.options.size.height or 0) / max(height, width)
            target = max(round(height * scale), self.smallest), max(round(width * scale), self.smallest)
            pixels = resize(pixels, target, self.options.resample)
        if self.options.do_pad:
            pixels = pad_to_square(pixels, self.per_channel_background(pixels.shape[2]))
        return EncodedImage({"pixel_values": self.normalize(pixels)}, size)

    def per_channel_background(self, channels: int) -> tuple[int, ...]:
        """The background's value in each channel. Raises ImageError where the image has another number of them."""
        return tuple(int(value) for value in self.per_channel(tuple(float(value) for value in self.background), channels))
