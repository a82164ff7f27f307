"""Idefics3ImageProcessor and SmolVLMImageProcessor, which are the same (transformers `models/idefics3`, `models/smolvlm`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vlm_edge_runtime.errors import UnsupportedModelError

from .base import EncodedImage, ImageProcessor
from .geometry import longest_edge_size, tiling_size
from .ops import Pixels, resize
from .options import HALF


class Idefics3ImageProcessor(ImageProcessor):
    """`pixel_values [tiles, C, tile, tile]`: the image cut into rows × columns tiles, then the whole image as one more tile.

    transformers pads the tiles of a batch to a common count and marks the padding in `pixel_attention_mask`; here every image
    stands alone and every tile is full, so there is nothing to pad or mask and `do_pad` makes no difference.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "do_resize": True,
        "size": {"longest_edge": 4 * 364},
        "max_image_size": {"longest_edge": 364},
        "resample": 1,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": HALF,
        "image_std": HALF,
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_pad": True,
    }
    own_options: ClassVar[frozenset[str]] = frozenset({"do_image_splitting", "max_image_size"})

    def check(self) -> None:
        size, max_size = self.options.size, self.options.extra["max_image_size"]
        if self.options.do_resize and not size.longest_edge and not (size.height and size.width):
            raise UnsupportedModelError(f"size of {self.name} must give 'longest_edge', or 'height' and 'width'; found {size}")
        tile = max_size.get("longest_edge") if isinstance(max_size, Mapping) else None
        if not isinstance(tile, int) or tile < 1:
            raise UnsupportedModelError(f"max_image_size of {self.name} must give a positive 'longest_edge'; found {max_size!r}")
        self.tile: int = tile
        tokens = self.processor_config.get("image_seq_len")
        self.tokens_per_tile: int | None = tokens if isinstance(tokens, int) else None

    def encode(self, pixels: Pixels, size: tuple[int, int]) -> EncodedImage:
        options, tile = self.options, self.tile
        if options.do_resize:
            pixels = resize(pixels, self._target(*_height_width(pixels)), options.resample)
        rows = columns = 0
        frames: list[Pixels] = []
        if options.extra["do_image_splitting"]:
            pixels = resize(pixels, tiling_size(*_height_width(pixels), tile), options.resample)
            height, width = _height_width(pixels)
            if height > tile or width > tile:
                rows, columns = height // tile, width // tile
                frames = [
                    pixels[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
                    for row in range(rows)
                    for column in range(columns)
                ]
        frames.append(resize(pixels, (tile, tile), options.resample))
        tokens = None if self.tokens_per_tile is None else self.tokens_per_tile * len(frames)
        return EncodedImage({"pixel_values": self.normalize(*frames)}, size, rows=rows, columns=columns, tokens=tokens)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        size = self.options.size
        if size.longest_edge:
            return longest_edge_size(height, width, size.longest_edge)
        assert size.height and size.width  # check() saw to it
        return size.height, size.width


def _height_width(pixels: Pixels) -> tuple[int, int]:
    return pixels.shape[0], pixels.shape[1]
