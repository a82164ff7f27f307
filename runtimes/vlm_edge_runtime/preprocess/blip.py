"""BlipImageProcessor (transformers `models/blip`): BLIP, BLIP-2, InstructBLIP, and the frames of InstructBLIP-Video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import FixedSizeProcessor
from .options import CLIP_MEAN, CLIP_STD


class BlipImageProcessor(FixedSizeProcessor):
    """Resize to a fixed size without keeping the aspect ratio, normalise."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "do_resize": True,
        "size": {"height": 384, "width": 384},
        "default_to_square": True,
        "resample": 3,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }
