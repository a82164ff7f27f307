"""Gemma3ImageProcessor with pan and scan, against transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import Gemma3ImageProcessorPil

from vlm_edge_runtime.errors import ImageError, UnsupportedModelError
from vlm_edge_runtime.preprocess import load_image_processor

SMALL = {"size": {"height": 48, "width": 40}}
SCAN = SMALL | {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 24,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
OPTIONS = [
    SMALL,
    SCAN,
    SCAN | {"pan_and_scan_max_num_crops": 2},
    SCAN | {"pan_and_scan_min_ratio_to_activate": 1.0},
    SCAN | {"pan_and_scan_min_crop_size": 100},
    SCAN | {"resample": 3, "image_mean": [0.1, 0.2, 0.3]},
    SCAN | {"do_normalize": False, "rescale_factor": 1 / 127.5},
]


def _ours(options: dict[str, Any]):
    return load_image_processor({"image_processor_type": "Gemma3ImageProcessor", **options})


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [(100, 100), (119, 100), (120, 100), (150, 100), (249, 100), (100, 251), (97, 333), (1000, 61)])
def test_pixels_and_crops(options, size):
    image = Image.fromarray(np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    expected = Gemma3ImageProcessorPil(**options)(image, return_tensors="np")
    encoded = _ours(options)(image)
    assert encoded.rows * encoded.columns == int(expected["num_crops"][0])
    assert encoded.tiles == len(encoded.arrays["pixel_values"])
    assert (encoded.rows > 1) == (size[1] > size[0] and encoded.rows > 0)
    np.testing.assert_array_equal(encoded.arrays["pixel_values"], expected["pixel_values"].astype(np.float32))


def test_every_picture(pictures):
    reference, ours = Gemma3ImageProcessorPil(**SCAN), _ours(SCAN)
    for name, image in pictures.items():
        expected = reference(image, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(ours(image).arrays["pixel_values"], expected.astype(np.float32), err_msg=name)


def test_options_saved_as_null_are_off():
    nulls = dict.fromkeys(key for key in SCAN if "pan" in key)
    encoded = _ours(SMALL | nulls)(Image.new("RGB", (900, 300)))
    assert (encoded.rows, encoded.columns) == (0, 0)
    on = _ours(SMALL | nulls | {"do_pan_and_scan": True})(Image.new("RGB", (900, 300)))
    assert (on.rows, on.columns) == (1, 3)  # Gemma3Processor's own numbers: crops of 256 pixels or more


def test_refusals():
    with pytest.raises(UnsupportedModelError, match="height"):
        _ours({"size": {"shortest_edge": 20}})
    with pytest.raises(UnsupportedModelError, match="pan_and_scan_max_num_crops"):
        _ours(SCAN | {"pan_and_scan_max_num_crops": 0})
    with pytest.raises(ImageError, match="too small"):
        _ours(SCAN | {"pan_and_scan_min_crop_size": 1, "pan_and_scan_max_num_crops": 3})(Image.new("RGB", (4, 1)))
