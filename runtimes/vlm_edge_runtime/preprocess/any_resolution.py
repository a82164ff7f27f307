"""LlavaNextImageProcessor and LlavaOnevisionImageProcessor (transformers `models/llava_next`, `models/llava_onevision`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from vlm_edge_runtime.errors import ImageError, UnsupportedModelError

from .base import EncodedImage, ImageProcessor, resized_size
from .geometry import best_resolution, fit_resolution
from .ops import Pixels, center_crop, resize
from .options import CLIP_MEAN, CLIP_STD

_ONEVISION_SIDE = 384


class LlavaNextImageProcessor(ImageProcessor):
    """`pixel_values [tiles, C, tile, tile]`: the whole image (its aspect ratio lost), then its tiles in reading order.

    The tiles are cut from the image fitted into the most suitable of `image_grid_pinpoints` and padded with black there.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "do_resize": True,
        "size": {"shortest_edge": 224},
        "default_to_square": False,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
        "do_pad": True,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    }
    own_options: ClassVar[frozenset[str]] = frozenset({"image_grid_pinpoints"})

    def prepare(self, config: dict[str, Any]) -> dict[str, Any]:
        # do_pad evens out the number of tiles in a batch; here every image stands alone.
        config.pop("pad_size", None)
        return config

    def check(self) -> None:
        options, found = self.options, self.options.extra["image_grid_pinpoints"]
        pairs = found if isinstance(found, (list, tuple)) else []
        if not pairs or any(not _is_size(pair) for pair in pairs):
            raise UnsupportedModelError(
                f"image_grid_pinpoints of {self.name} must be a list of [height, width] in pixels; found {found!r}"
            )
        self.pinpoints = [(int(height), int(width)) for height, width in pairs]
        size, crop = options.size, options.crop_size
        if size.height and size.width:
            self.whole = (size.height, size.width)
        elif size.shortest_edge:
            self.whole = (size.shortest_edge, size.shortest_edge)
        else:
            raise UnsupportedModelError(f"size of {self.name} must give 'shortest_edge', or 'height' and 'width'; found {size}")
        self.tile: int = crop.height if crop is not None and crop.height else self.whole[0]
        if options.do_center_crop and (crop is None or not crop.height or not crop.width):
            raise UnsupportedModelError(f"crop_size of {self.name} must give 'height' and 'width'; found {crop}")

    def encode(self, pixels: Pixels, size: tuple[int, int]) -> EncodedImage:
        height, width, channels = pixels.shape
        target = best_resolution(height, width, self.pinpoints)
        fitted = resize(pixels, fit_resolution(height, width, target), self.options.resample)
        padded = np.zeros((*target, channels), np.uint8)
        # The odd pixel of padding comes after the image.
        top, left = ((whole - part) // 2 for whole, part in zip(target, fitted.shape, strict=False))
        padded[top : top + fitted.shape[0], left : left + fitted.shape[1]] = fitted
        rows, columns = -(-target[0] // self.tile), -(-target[1] // self.tile)
        tiles = [
            padded[row * self.tile : (row + 1) * self.tile, column * self.tile : (column + 1) * self.tile]
            for row in range(rows)
            for column in range(columns)
        ]
        frames = [self._fit(frame) for frame in (resize(pixels, self.whole, self.options.resample), *tiles)]
        if len({frame.shape for frame in frames}) > 1:
            raise ImageError(
                f"{self.name} cuts the image into tiles of unlike sizes: image_grid_pinpoints must be multiples of {self.tile}"
            )
        return EncodedImage({"pixel_values": self.normalize(*frames)}, size, rows=rows, columns=columns)

    def _fit(self, frame: Pixels) -> Pixels:
        """What the shared options do to each tile after it was cut."""
        options = self.options
        if options.do_resize:
            frame = resize(frame, resized_size(options.size, frame.shape[0], frame.shape[1], self.name), options.resample)
        if options.do_center_crop:
            crop = options.crop_size
            assert crop is not None and crop.height and crop.width  # check() saw to it
            frame = center_crop(frame, (crop.height, crop.width))
        return frame


class LlavaOnevisionImageProcessor(LlavaNextImageProcessor):
    """As LLaVA-NeXT, with other defaults. Each image is cut up, as transformers does with a plain list of images."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **LlavaNextImageProcessor.defaults,
        "size": {"height": _ONEVISION_SIDE, "width": _ONEVISION_SIDE},
        "do_center_crop": None,
        "crop_size": None,
        "image_grid_pinpoints": [
            [rows * _ONEVISION_SIDE, columns * _ONEVISION_SIDE] for rows in range(1, 7) for columns in range(1, 7)
        ],
    }


def _is_size(pair: object) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(side, int) and side > 0 for side in pair)
