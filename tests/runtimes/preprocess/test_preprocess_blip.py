"""BlipImageProcessor against transformers' own."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import BlipImageProcessorPil

from vlm_edge_runtime.preprocess import load_image_processor

SMALL = {"size": {"height": 48, "width": 64}}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"size": 40},
    {"size": [40, 70]},
    {"size": {"shortest_edge": 40}},
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_convert_rgb": False},
    {"resample": 2},
    {"do_center_crop": True, "crop_size": 33},
    {"image_mean": [0.1, 0.2, 0.3], "image_std": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=json.dumps)
def test_options(options: dict[str, Any], pictures: dict[str, Image.Image]) -> None:
    reference, processor = (
        BlipImageProcessorPil(**(SMALL | options)),
        load_image_processor({"image_processor_type": "BlipImageProcessor", **SMALL, **options}),
    )
    for picture in ("astronaut.png", "coffee.png", "odd", "one-pixel"):
        expected = reference(pictures[picture], return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(processor(pictures[picture]).arrays["pixel_values"], expected, picture)


def test_every_picture(pictures: dict[str, Image.Image]) -> None:
    reference, processor = (
        BlipImageProcessorPil(**SMALL),
        load_image_processor({"image_processor_type": "BlipImageProcessor", **SMALL}),
    )
    for name, picture in pictures.items():
        expected = reference(picture, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(processor(picture).arrays["pixel_values"], expected, name)


def test_defaults_are_those_of_the_class(photographs: dict[str, Image.Image]) -> None:
    saved = json.loads(BlipImageProcessorPil().to_json_string())
    processor = load_image_processor(saved)
    assert processor.fingerprint == load_image_processor({"image_processor_type": "BlipImageProcessor"}).fingerprint
    expected = BlipImageProcessorPil()(photographs["chelsea.png"], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(processor(photographs["chelsea.png"]).arrays["pixel_values"], expected)


def test_files_as_published(photographs: dict[str, Image.Image]) -> None:
    """As `Salesforce/blip2-opt-2.7b` and `Salesforce/instructblip-vicuna-7b` have it."""
    published = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "BlipImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": "Blip2Processor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 224, "width": 224},
    }
    reference = BlipImageProcessorPil(**{key: value for key, value in published.items() if key != "image_processor_type"})
    for picture in photographs.values():
        expected = reference(picture, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(load_image_processor(published)(picture).arrays["pixel_values"], expected)
