"""IdeficsImageProcessor (transformers `models/idefics`): resize to a fixed square, normalise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import FixedSizeProcessor
from .options import CLIP_MEAN, CLIP_STD


class IdeficsImageProcessor(FixedSizeProcessor):
    """The aspect ratio is not kept. `image_size` is the older spelling of `size`."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": 3,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }
    own_options: ClassVar[frozenset[str]] = frozenset({"image_num_channels"})

    def prepare(self, config: dict[str, Any]) -> dict[str, Any]:
        size = config.pop("image_size", None)
        if size is not None and "size" not in config:
            config["size"] = {"height": size, "width": size}
        return config
