"""Chameleon's and Janus's image processors against transformers' own, number for number."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from transformers import ChameleonImageProcessorPil, JanusImageProcessorPil

from vlm_edge_runtime.errors import UnsupportedModelError
from vlm_edge_runtime.preprocess import load_image_processor

SIZES = [(64, 48), (33, 90), (200, 70), (32, 32), (7, 300), (511, 257)]
OPTIONS = [
    (ChameleonImageProcessorPil, {}),
    (ChameleonImageProcessorPil, {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 40}}),
    (JanusImageProcessorPil, {}),
    (
        JanusImageProcessorPil,
        {"size": {"height": 48, "width": 48}, "min_size": 5, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ),
    (JanusImageProcessorPil, {"size": {"height": 32, "width": 32}, "do_pad": False}),
]


@pytest.mark.parametrize(
    ("kind", "options"), OPTIONS, ids=lambda value: value.__name__ if isinstance(value, type) else str(len(value))
)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_the_same_numbers(kind, options, mode) -> None:
    reference = kind(**options)
    config = json.loads(reference.to_json_string())
    if mode != "RGB" and not config.get("do_convert_rgb"):
        pytest.skip("this processor takes pictures of three channels only")
    processor = load_image_processor(config)
    generator = np.random.default_rng(5)
    for width, height in SIZES:
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
        expected = reference(image, return_tensors="np")["pixel_values"]
        got = processor(image)
        assert got.size == (height, width)
        assert got.arrays["pixel_values"].dtype == np.float32
        np.testing.assert_array_equal(got.arrays["pixel_values"], expected.astype(np.float32), str((width, height)))


def test_a_size_that_is_no_square_is_refused() -> None:
    config = {"image_processor_type": "JanusImageProcessor", "size": {"height": 32, "width": 48}}
    with pytest.raises(UnsupportedModelError, match="equal"):
        load_image_processor(config)
