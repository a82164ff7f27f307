"""Gemma3ImageProcessor (transformers `models/gemma3`): a fixed size, and for long pictures a row or column of crops."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from vlm_edge_runtime.errors import ImageError, UnsupportedModelError

from .base import EncodedImage, ImageProcessor
from .ops import Pixels, resize
from .options import HALF, positive


class Gemma3ImageProcessor(ImageProcessor):
    """`pixel_values [1 + crops, C, H, W]`: the whole image, then its crops in reading order, all in one size.

    Pan and scan (Gemma 3, arXiv 2503.19786, section 2): with `do_pan_and_scan` an image whose sides are as
    `pan_and_scan_min_ratio_to_activate` or more is also cut along its longer side into 2 to `pan_and_scan_max_num_crops` pieces,
    unless they would be smaller than `pan_and_scan_min_crop_size` pixels. Checkpoints save these as null, which is off.
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
    }
    own_options: ClassVar[frozenset[str]] = frozenset(
        {
            "do_pan_and_scan",
            "pan_and_scan_min_crop_size",
            "pan_and_scan_max_num_crops",
            "pan_and_scan_min_ratio_to_activate",
        }
    )
    _crop_defaults: ClassVar[Mapping[str, Any]] = {
        "pan_and_scan_min_crop_size": 256,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    """What Gemma3Processor puts in the place of null."""

    def prepare(self, config: dict[str, Any]) -> dict[str, Any]:
        missing = {key: value for key, value in self._crop_defaults.items() if config.get(key) is None}
        return {**config, **missing}

    def check(self) -> None:
        size = self.options.size
        if not size.height or not size.width or not self.options.do_resize:
            raise UnsupportedModelError(
                f"size of {self.name} must give 'height' and 'width', with do_resize on; found {size}, "
                f"do_resize={self.options.do_resize}"
            )
        self.target = size.height, size.width
        self.smallest = positive(self.options, "pan_and_scan_min_crop_size")
        self.most = positive(self.options, "pan_and_scan_max_num_crops")
        ratio = self.options.extra["pan_and_scan_min_ratio_to_activate"]
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
            raise UnsupportedModelError(f"pan_and_scan_min_ratio_to_activate={ratio!r} of {self.name} is not a number")
        self.ratio = float(ratio)
        tokens = self.processor_config.get("image_seq_length")
        self.tokens_per_image: int | None = tokens if isinstance(tokens, int) else None

    def encode(self, pixels: Pixels, size: tuple[int, int]) -> EncodedImage:
        rows, columns = self._crops(*pixels.shape[:2]) if self.options.extra["do_pan_and_scan"] else (0, 0)
        frames = [pixels]
        if rows:
            height, width = math.ceil(pixels.shape[0] / rows), math.ceil(pixels.shape[1] / columns)
            frames += [
                pixels[row * height : (row + 1) * height, column * width : (column + 1) * width]
                for row in range(rows)
                for column in range(columns)
            ]
        if not all(frame.size for frame in frames):
            raise ImageError(f"an image of {size[1]} × {size[0]} cannot be cut into {rows * columns} crops; it is too small")
        values = self.normalize(*(resize(frame, self.target, self.options.resample) for frame in frames))
        tokens = None if self.tokens_per_image is None else self.tokens_per_image * len(frames)
        return EncodedImage({"pixel_values": values}, size, rows=rows, columns=columns, tokens=tokens)

    def _crops(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of crops, one of them 1; both 0 for an image that is left whole."""
        longer, shorter = max(height, width), min(height, width)
        if longer / shorter < self.ratio:
            return 0, 0
        count = min(self.most, max(2, min(longer // self.smallest, math.floor(longer / shorter + 0.5))))
        if min(math.ceil(longer / count), shorter) < self.smallest:
            return 0, 0
        return (1, count) if width >= height else (count, 1)
