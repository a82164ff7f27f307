"""PixtralImageProcessor (transformers `models/pixtral`): any size up to a longest side, cut into patches in reading order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vlm_edge_runtime.errors import ImageError, UnsupportedModelError

from .base import EncodedImage, ImageProcessor
from .geometry import whole_patches_size
from .ops import Patches, Pixels, center_crop, resize
from .options import CLIP_MEAN, CLIP_STD
from .qwen2_vl import vision_position_ids


class PixtralImageProcessor(ImageProcessor):
    """`pixel_values [patches, C · patch · patch]`, `position_ids int64 [patches, 2]` (row, column).

    The patch is the vision encoder's; both sides of the image are made multiples of `spatial_merge_size` patches where
    `processor_config.json` names one, as PixtralProcessor does.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "do_resize": True,
        "size": {"longest_edge": 1024},
        "default_to_square": True,
        "resample": 3,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_pad": True,
        "do_convert_rgb": True,
        "patch_size": {"height": 16, "width": 16},
    }
    own_options: ClassVar[frozenset[str]] = frozenset({"patch_size"})

    def prepare(self, config: dict[str, Any]) -> dict[str, Any]:
        # do_pad evens out the images of a batch; here every image stands alone.
        config.pop("pad_size", None)
        return config

    def check(self) -> None:
        size, own = self.options.size, self.options.extra["patch_size"]
        self.patch = _side(self.processor_config.get("patch_size", own))
        merge = self.processor_config.get("spatial_merge_size", 1)
        if not self.patch or not isinstance(merge, int) or merge < 1:
            raise UnsupportedModelError(f"patch_size of {self.name} must be one side of a square in pixels; found {own!r}")
        self.merge: int = merge
        if size.longest_edge:
            self.largest = (size.longest_edge, size.longest_edge)
        elif size.height and size.width:
            self.largest = (size.height, size.width)
        elif self.options.do_resize:
            raise UnsupportedModelError(f"size of {self.name} must give 'longest_edge', or 'height' and 'width'; found {size}")

    def encode(self, pixels: Pixels, size: tuple[int, int]) -> EncodedImage:
        options, factor = self.options, self.patch * self.merge
        if options.do_resize:
            target = whole_patches_size(pixels.shape[0], pixels.shape[1], self.largest, factor)
            pixels = resize(pixels, target, options.resample)
        if options.do_center_crop:
            crop = options.crop_size
            if crop is None or not crop.height or not crop.width:
                raise UnsupportedModelError(f"crop_size of {self.name} must give 'height' and 'width'; found {crop}")
            pixels = center_crop(pixels, (crop.height, crop.width))
        height, width, _ = pixels.shape
        if height % factor or width % factor:
            raise ImageError(f"the image is {width} × {height} when it is cut up; both sides must be multiples of {factor}")
        rows, columns = height // self.patch, width // self.patch
        return EncodedImage(
            {
                "pixel_values": self.normalize(pixels, patches=Patches(self.patch)),
                "position_ids": vision_position_ids(rows, columns, 1),
            },
            size,
            grid=(1, rows, columns),
            tokens=rows * columns // self.merge**2,
        )


def _side(value: object) -> int:
    """The side of a square, from a number or {height, width}; 0 for anything else."""
    if isinstance(value, Mapping) and value.get("height") == value.get("width"):
        value = value.get("height")
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
