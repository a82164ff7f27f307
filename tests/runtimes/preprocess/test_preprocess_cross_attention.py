"""ViT's, DeiT's, Donut's and Pix2Struct's image processors against transformers' own."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from vlm_edge_runtime.errors import ImageError, UnsupportedModelError
from vlm_edge_runtime.preprocess import load_image_processor

FIXED = {"size": {"height": 48, "width": 64}}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("ViT", FIXED),
    ("ViT", {"size": 40}),
    ("ViT", {**FIXED, "do_rescale": False}),
    ("ViT", {**FIXED, "resample": 3, "image_mean": [0.1, 0.2, 0.3]}),
    ("DeiT", {"size": 40, "crop_size": 32}),
    ("DeiT", {"size": 30, "crop_size": {"height": 48, "width": 24}}),
    ("DeiT", {"size": 40, "do_center_crop": False}),
    ("Donut", FIXED),
    ("Donut", {"size": {"height": 64, "width": 48}}),
    ("Donut", {**FIXED, "do_align_long_axis": True}),
    ("Donut", {"size": {"height": 64, "width": 48}, "do_align_long_axis": True}),
    ("Donut", {"size": [64, 48]}),
    ("Donut", {**FIXED, "do_normalize": False, "do_rescale": False}),
]


def both(kind: str, options: dict[str, Any]):
    reference = getattr(transformers, f"{kind}ImageProcessorPil")(**options)
    return reference, load_image_processor(json.loads(reference.to_json_string()))


@pytest.mark.parametrize(("kind", "options"), CASES, ids=[f"{kind} {json.dumps(options)}" for kind, options in CASES])
def test_pixels_are_transformers_own(kind: str, options: dict[str, Any], photographs: dict[str, Image.Image]) -> None:
    reference, processor = both(kind, options)
    own = load_image_processor({"image_processor_type": f"{kind}ImageProcessor", **options})
    pictures = {
        **photographs,
        "tall": photographs["chelsea.png"].resize((33, 171)),
        "odd": photographs["coffee.png"].resize((77, 65)),
    }
    for name, picture in pictures.items():
        expected = reference(picture, return_tensors="np")["pixel_values"]
        for one in (processor, own):
            np.testing.assert_array_equal(one(picture).arrays["pixel_values"], expected, name)


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Donut", "Pix2Struct"])
def test_defaults_are_those_of_the_class(kind: str) -> None:
    saved = both(kind, {})[1]
    assert saved.fingerprint == load_image_processor({"image_processor_type": f"{kind}ImageProcessor"}).fingerprint


def test_donut_as_published(photographs: dict[str, Image.Image]) -> None:
    """As `naver-clova-ix/donut-base` has it: the size is (width, height)."""
    published = {
        "do_align_long_axis": False,
        "do_normalize": True,
        "do_pad": True,
        "do_resize": True,
        "do_thumbnail": True,
        "feature_extractor_type": "DonutFeatureExtractor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "size": [192, 256],
    }
    picture = photographs["astronaut.png"]
    reference = transformers.DonutImageProcessorPil(**{k: v for k, v in published.items() if k != "feature_extractor_type"})
    expected = reference(picture, return_tensors="np")["pixel_values"]
    assert expected.shape == (1, 3, 256, 192)
    np.testing.assert_array_equal(load_image_processor(published)(picture).arrays["pixel_values"], expected)


def test_donut_refuses_what_does_not_fit_its_frame(photographs: dict[str, Image.Image]) -> None:
    config = {"image_processor_type": "DonutImageProcessor", **FIXED, "do_resize": False, "do_thumbnail": False}
    with pytest.raises(ImageError, match="larger than the frame of 64 × 48"):
        load_image_processor(config)(photographs["chelsea.png"])


@pytest.mark.parametrize(
    "options",
    [
        {"max_patches": 40, "patch_size": {"height": 8, "width": 8}},
        {"max_patches": 300},
        {"max_patches": 60, "patch_size": {"height": 8, "width": 12}},
        {"max_patches": 60, "do_normalize": False},
    ],
    ids=json.dumps,
)
def test_patches_are_transformers_own(options: dict[str, Any], pictures: dict[str, Image.Image]) -> None:
    """Without the padding. Sums of float32 in another order: a few units of 2⁻²⁴ of the largest value."""
    reference, processor = both("Pix2Struct", options)
    for name in ("astronaut.png", "coffee.png", "odd", "grey", "rgba", "one-pixel-high"):
        expected = reference(pictures[name], return_tensors="np")
        real = expected["attention_mask"][0] > 0
        found = processor(pictures[name]).arrays["flattened_patches"]
        wanted = expected["flattened_patches"][0][real]
        assert found.shape == wanted.shape and found.dtype == np.float32, name
        np.testing.assert_array_equal(found[:, :2], wanted[:, :2], name)
        scale = max(1.0, float(np.abs(wanted[:, 2:]).max()))
        assert float(np.abs(found - wanted).max()) <= 4e-6 * scale, name


def test_questions_drawn_onto_the_image_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="draws the question"):
        load_image_processor({"image_processor_type": "Pix2StructImageProcessor", "is_vqa": True})
