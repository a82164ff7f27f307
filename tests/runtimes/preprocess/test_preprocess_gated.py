"""IdeficsImageProcessor and MllamaImageProcessor against transformers' own."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import IdeficsImageProcessorPil, MllamaImageProcessorPil

from vlm_edge_runtime.errors import UnsupportedModelError
from vlm_edge_runtime.preprocess import load_image_processor

SIDE = {"height": 48, "width": 48}


@pytest.mark.parametrize(
    "options",
    [{"image_size": 56}, {"size": SIDE}, {"size": SIDE, "resample": 2}, {"size": SIDE, "do_normalize": False}],
    ids=json.dumps,
)
def test_idefics(options: dict[str, Any], pictures: dict[str, Image.Image]) -> None:
    reference = IdeficsImageProcessorPil(**options)
    processor = load_image_processor({"image_processor_type": "IdeficsImageProcessor", **options})
    for name, picture in pictures.items():
        expected = np.asarray(reference(picture, return_tensors="np"))
        np.testing.assert_array_equal(processor(picture).arrays["pixel_values"], expected, name)


def test_idefics_as_saved(photographs: dict[str, Image.Image]) -> None:
    saved = json.loads(IdeficsImageProcessorPil(image_size=64).to_json_string())
    expected = np.asarray(IdeficsImageProcessorPil(image_size=64)(photographs["chelsea.png"], return_tensors="np"))
    np.testing.assert_array_equal(load_image_processor(saved)(photographs["chelsea.png"]).arrays["pixel_values"], expected)


@pytest.mark.parametrize(
    "options",
    [{"size": SIDE}, {"size": SIDE, "max_image_tiles": 6}, {"size": SIDE, "max_image_tiles": 1}, {"size": SIDE, "resample": 3}],
    ids=json.dumps,
)
def test_mllama(options: dict[str, Any], pictures: dict[str, Image.Image]) -> None:
    reference = MllamaImageProcessorPil(**options)
    processor = load_image_processor({"image_processor_type": "MllamaImageProcessor", **options})
    for name, picture in pictures.items():
        expected, found = reference(picture, return_tensors="np"), processor(picture)
        for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            np.testing.assert_array_equal(found.arrays[key], np.asarray(expected[key])[0], f"{name} {key}")
        assert found.rows * found.columns == expected["num_tiles"][0][0]


def test_mllama_sizes(photographs: dict[str, Image.Image]) -> None:
    """Smaller than a tile, as large as a canvas, between both, and slivers."""
    reference = MllamaImageProcessorPil(size=SIDE)
    processor = load_image_processor({"image_processor_type": "MllamaImageProcessor", "size": SIDE})
    for width, height in [(10, 10), (48, 48), (47, 97), (96, 96), (200, 49), (49, 192), (400, 30), (1, 90), (300, 301)]:
        picture = photographs["coffee.png"].resize((width, height))
        expected = reference(picture, return_tensors="np")
        found = processor(picture).arrays
        for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            np.testing.assert_array_equal(found[key], np.asarray(expected[key])[0], f"{width} × {height} {key}")


@pytest.mark.parametrize(
    ("options", "said"),
    [({"do_pad": False}, "do_pad"), ({"size": {"height": 4, "width": 5}}, "equal"), ({"max_image_tiles": 0}, "1 or more")],
)
def test_mllama_refuses(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        load_image_processor({"image_processor_type": "MllamaImageProcessor", **options})
