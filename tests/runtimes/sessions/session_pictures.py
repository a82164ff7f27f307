"""The pictures that sessions are asked about."""

from __future__ import annotations

import numpy as np
from PIL import Image


def noise(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    """A picture that no other seed gives."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
