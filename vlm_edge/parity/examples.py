"""What a bundle is tried on: pictures with prompts. A small set is drawn here, so that a comparison needs no download."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .report import ExampleView

THUMBNAIL = 128
"""Longest side of a picture on the page, in pixels."""


@dataclass(frozen=True, slots=True)
class Example:
    """Pictures and a prompt for a generating model; for a dual encoder the prompt is a text to compare the pictures with."""

    images: tuple[Image.Image, ...]
    prompt: str


def built_in() -> list[Example]:
    """Five examples: wide, tall and square pictures, smooth, noisy and with sharp edges; the last has two in one prompt.

    The content is arbitrary: parity asks for equal answers, not for good ones.
    """
    return [
        Example((_scene(96, 96),), "What is in the picture?"),
        Example((_gradient(160, 96),), "Describe this image."),
        Example((_noise(64, 112),), "How many shapes are there?"),
        Example((_stripes(224, 224),), "Is there a red circle?"),
        Example((_scene(96, 96), _gradient(160, 96)), "Compare both pictures."),
    ]


def built_in_pairs() -> list[Example]:
    """For dual encoders: pictures, and short texts to compare each of them with."""
    words = ("a red circle", "a photo of the sea", "noise", "stripes")
    return [Example(example.images, text) for example, text in zip(built_in(), words, strict=False)]


def view(example: Example) -> ExampleView:
    """An example with its pictures made small, as data URLs."""
    return ExampleView(prompt=example.prompt, pictures=[_data_url(image) for image in example.images])


def views(examples: Sequence[Example]) -> list[ExampleView]:
    """`view` of each."""
    return [view(example) for example in examples]


def _data_url(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _scene(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), (235, 235, 225))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 10, height // 6, width // 10 + height // 3, height // 2), fill=(205, 40, 35))
    draw.rectangle((width // 2, height // 2, width * 9 // 10, height * 9 // 10), fill=(40, 80, 200))
    draw.polygon(
        [(width * 3 // 5, height // 10), (width // 2, height * 2 // 5), (width * 9 // 10, height * 2 // 5)], fill=(30, 150, 60)
    )
    return image


def _gradient(width: int, height: int) -> Image.Image:
    x, y = np.linspace(0, 255, width)[None, :], np.linspace(0, 255, height)[:, None]
    planes = np.stack([x + 0 * y, 0 * x + y, 255 - (x + y) / 2], axis=-1)
    return Image.fromarray(planes.astype(np.uint8))


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (height, width, 3)).astype(np.uint8))


def _stripes(width: int, height: int) -> Image.Image:
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    planes = np.stack([(x // 8 % 2) * 255 + 0 * y, (y // 12 % 2) * 255 + 0 * x, ((x + y) // 16 % 2) * 255], axis=-1)
    return Image.fromarray(planes.astype(np.uint8))
