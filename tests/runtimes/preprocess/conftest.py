"""Real photographs, and pictures in every mode a user may bring, without any download."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image
from sklearn.datasets import load_sample_images

SKIMAGE = Path(skimage.__file__).parent / "data"


def _photographs() -> dict[str, Image.Image]:
    flower_china = load_sample_images()
    images = {
        name: Image.open(SKIMAGE / name).convert("RGB") for name in ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
    }
    images |= {
        Path(name).name: Image.fromarray(pixels) for name, pixels in zip(flower_china.filenames, flower_china.images, strict=True)
    }
    return images


def jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _modes(photo: Image.Image) -> dict[str, Image.Image]:
    """Pictures that transformers takes too, so that both can be compared."""
    small = photo.resize((123, 87))
    alpha = Image.fromarray((np.indices((87, 123)).sum(0) % 256).astype(np.uint8))
    rgba = small.copy()
    rgba.putalpha(alpha)
    grey_alpha = small.convert("L")
    grey_alpha.putalpha(alpha)
    palette = small.quantize(32)
    keyed = palette.copy()
    keyed.info["transparency"] = 3
    return {
        "grey": small.convert("L"),
        "bilevel": small.convert("1"),
        "rgba": rgba,
        "grey-alpha": grey_alpha,
        "palette": palette,
        "palette-transparent": keyed,
        "cmyk": small.convert("CMYK"),
        "ycbcr": small.convert("YCbCr"),
        "one-pixel-wide": small.crop((0, 0, 1, 87)),
        "one-pixel-high": small.crop((0, 0, 123, 1)),
        "one-pixel": small.crop((0, 0, 1, 1)),
        "8000-wide": photo.resize((8000, 61)),
        "odd": photo.crop((0, 0, 257, 511)),
    }


@pytest.fixture(scope="session")
def photographs() -> dict[str, Image.Image]:
    return _photographs()


@pytest.fixture(scope="session")
def pictures(photographs: dict[str, Image.Image]) -> dict[str, Image.Image]:
    return photographs | _modes(photographs["astronaut.png"])
