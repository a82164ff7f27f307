"""ChameleonImageProcessor (transformers `models/chameleon`): shorter side, centre crop, values from −1 to about 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import FixedSizeProcessor


class ChameleonImageProcessor(FixedSizeProcessor):
    """As CLIP's, with Lanczos resampling; pixel · 0.0078 − 1."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "do_resize": True,
        "size": {"shortest_edge": 512},
        "default_to_square": False,
        "resample": 1,
        "do_center_crop": True,
        "crop_size": {"height": 512, "width": 512},
        "do_rescale": True,
        "rescale_factor": 0.0078,
        "do_normalize": True,
        "image_mean": (1.0, 1.0, 1.0),
        "image_std": (1.0, 1.0, 1.0),
        "do_convert_rgb": True,
    }
