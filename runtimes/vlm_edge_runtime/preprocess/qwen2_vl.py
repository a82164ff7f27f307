"""Qwen2VLImageProcessor (transformers `models/qwen2_vl`): any size, cut into patches that come in merge-block order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.errors import ImageError, UnsupportedModelError

from .base import EncodedImage, ImageProcessor
from .geometry import smart_resize
from .ops import Patches, Pixels, resize
from .options import CLIP_MEAN, CLIP_STD, positive

_OWN = ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size")


class Qwen2VLImageProcessor(ImageProcessor):
    """`pixel_values [patches, channels · t · p · p]` and `position_ids int64 [patches, 2]` (height, width index).

    The patches of one merge × merge block stand next to each other, blocks in reading order: the merger joins each run of
    merge² rows into one image token. A still image fills all `temporal_patch_size` frames of its one time step.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "do_resize": True,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        "default_to_square": False,
        "resample": 3,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    own_options: ClassVar[frozenset[str]] = frozenset(_OWN)

    def prepare(self, config: dict[str, Any]) -> dict[str, Any]:
        # The older spelling of the area bounds overrides `size`, whose "edges" are areas too.
        size = config.get("size")
        bounds = {"shortest_edge": config.pop("min_pixels", None), "longest_edge": config.pop("max_pixels", None)}
        given = {key: value for key, value in bounds.items() if value is not None}
        if given:
            merged = dict(self.defaults["size"] if size is None else size) if size is None or isinstance(size, Mapping) else {}
            for key, old in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
                if key in given:
                    merged.pop(old, None)
            config["size"] = {**merged, **given}
        return config

    def check(self) -> None:
        size = self.options.size
        if self.options.do_resize and not (size.shortest_edge and size.longest_edge):
            raise UnsupportedModelError(
                f"size of {self.name} must give 'shortest_edge' and 'longest_edge' (the smallest and largest area); found {size}"
            )
        self.patch = positive(self.options, "patch_size")
        self.temporal_patch = positive(self.options, "temporal_patch_size")
        self.merge = positive(self.options, "merge_size")
        self.patches = Patches(self.patch, self.merge, self.temporal_patch)

    def encode(self, pixels: Pixels, size: tuple[int, int]) -> EncodedImage:
        factor = self.patch * self.merge
        if self.options.do_resize:
            bounds = self.options.size
            assert bounds.shortest_edge and bounds.longest_edge  # check() saw to it
            height, width, _ = pixels.shape
            target = smart_resize(height, width, factor, bounds.shortest_edge, bounds.longest_edge)
            pixels = resize(pixels, target, self.options.resample)
        height, width, _ = pixels.shape
        if height % factor or width % factor:
            raise ImageError(f"the image is {width} × {height} and do_resize is false; both sides must be multiples of {factor}")
        rows, columns = height // self.patch, width // self.patch
        return EncodedImage(
            {
                "pixel_values": self.normalize(pixels, patches=self.patches),
                "position_ids": vision_position_ids(rows, columns, self.merge),
            },
            size,
            grid=(1, rows, columns),
            tokens=rows * columns // self.merge**2,
        )


def vision_position_ids(rows: int, columns: int, merge: int) -> npt.NDArray[np.int64]:
    """int64 `[rows · columns, 2]`: each patch's (height, width) index in merge-block order, for the vision rotary embedding.

    As transformers' `vision_utils.get_vision_position_ids` for one still image.
    """
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    blocks = grid.reshape(rows // merge, merge, columns // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(blocks.reshape(-1, 2), dtype=np.int64)
