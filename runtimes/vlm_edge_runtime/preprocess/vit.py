"""ViTImageProcessor and DeiTImageProcessor (transformers `models/vit`, `models/deit`): ViT-GPT2, TrOCR, and other encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import FixedSizeProcessor
from .options import HALF

_SHARED: dict[str, Any] = {
    "do_resize": True,
    "default_to_square": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": HALF,
    "image_std": HALF,
}


class ViTImageProcessor(FixedSizeProcessor):
    """Resize to a fixed size without keeping the aspect ratio, normalise to [−1, 1]."""

    defaults: ClassVar[Mapping[str, Any]] = {**_SHARED, "size": {"height": 224, "width": 224}, "resample": 2}


class DeiTImageProcessor(FixedSizeProcessor):
    """As ViT's, and the middle is cut out of a somewhat larger picture."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **_SHARED,
        "size": {"height": 256, "width": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    }
