"""CLIPImageProcessor, and LlavaImageProcessor, which may first pad to a square (transformers `models/clip`, `models/llava`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vlm_edge_runtime.errors import UnsupportedModelError

from .base import EncodedImage, FixedSizeProcessor
from .ops import Pixels, pad_to_square
from .options import CLIP_MEAN, CLIP_STD

_DEFAULTS = {
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
}


class ClipImageProcessor(FixedSizeProcessor):
    """Resize the shorter side, crop the centre, normalise."""

    defaults: ClassVar[Mapping[str, Any]] = _DEFAULTS
    own_options: ClassVar[frozenset[str]] = frozenset({"use_square_size"})

    def prepare(self, config: dict[str, Any]) -> dict[str, Any]:
        if config.get("use_square_size"):
            # KOSMOS-2's old spelling: the class's default side, whatever `size` says.
            config["size"] = {"height": 224, "width": 224}
        return config


class LlavaImageProcessor(FixedSizeProcessor):
    """As CLIP; with `do_pad` the image is first centred on a square of the mean colour."""

    defaults: ClassVar[Mapping[str, Any]] = _DEFAULTS

    def prepare(self, config: dict[str, Any]) -> dict[str, Any]:
        # transformers' class does not look at it; the shared pipeline would.
        config.pop("pad_size", None)
        return config

    def check(self) -> None:
        super().check()
        if self.options.do_pad and isinstance(self.options.image_mean, float):
            raise UnsupportedModelError(f"do_pad of {self.name} fills with image_mean, which must give one number per channel")

    def encode(self, pixels: Pixels, size: tuple[int, int]) -> EncodedImage:
        if self.options.do_pad:
            mean = self.per_channel(self.options.image_mean, pixels.shape[2])
            pixels = pad_to_square(pixels, [int(value * 255) for value in mean])
        return super().encode(pixels, size)
