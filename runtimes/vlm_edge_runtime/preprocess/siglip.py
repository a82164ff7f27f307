"""SiglipImageProcessor (transformers `models/siglip`): resize to a fixed size, normalise to [−1, 1]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import FixedSizeProcessor
from .options import HALF


class SiglipImageProcessor(FixedSizeProcessor):
    """No crop by default; the aspect ratio is not kept."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "default_to_square": False,
        "resample": 3,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": HALF,
        "image_std": HALF,
        "do_convert_rgb": True,
    }
