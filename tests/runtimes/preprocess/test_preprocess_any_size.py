"""Processors of images that become different numbers of tiles or patches, against transformers' own (its PIL backends)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import (
    GotOcr2ImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    PixtralImageProcessorPil,
)

from vlm_edge_runtime.errors import ImageError, UnsupportedModelError
from vlm_edge_runtime.preprocess import load_image_processor
from vlm_edge_runtime.preprocess.geometry import least_scaled_arrangement

REFERENCE = {
    "LlavaNextImageProcessor": LlavaNextImageProcessorPil,
    "LlavaOnevisionImageProcessor": LlavaOnevisionImageProcessorPil,
    "GotOcr2ImageProcessor": GotOcr2ImageProcessorPil,
    "PixtralImageProcessor": PixtralImageProcessorPil,
}
PINPOINTS = [[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]
NEXT = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "image_grid_pinpoints": PINPOINTS}
ONEVISION = {"size": {"height": 32, "width": 32}, "image_grid_pinpoints": PINPOINTS}
TILED = {"size": {"height": 32, "width": 32}, "crop_to_patches": True, "max_patches": 6}
PATCHED = {"size": {"longest_edge": 96}, "patch_size": {"height": 8, "width": 8}}
PIXELS = [
    {},
    {"do_rescale": False, "do_normalize": False},
    {"image_mean": [1.0, 0.9, 0.8], "image_std": [0.3, 0.2, 0.1]},
    {"do_convert_rgb": False},
    {"resample": 2},
]
CASES = [
    *(("LlavaNextImageProcessor", NEXT | each) for each in PIXELS),
    *(("LlavaOnevisionImageProcessor", ONEVISION | each) for each in PIXELS),
    *(("GotOcr2ImageProcessor", TILED | each) for each in PIXELS),
    *(("PixtralImageProcessor", PATCHED | each) for each in PIXELS),
    ("LlavaNextImageProcessor", {}),
    ("LlavaNextImageProcessor", NEXT | {"do_resize": False}),
    ("LlavaNextImageProcessor", NEXT | {"size": {"height": 40, "width": 36}}),
    ("LlavaOnevisionImageProcessor", {}),
    ("LlavaOnevisionImageProcessor", ONEVISION | {"do_pad": False}),
    ("GotOcr2ImageProcessor", TILED | {"crop_to_patches": False}),
    ("GotOcr2ImageProcessor", TILED | {"max_patches": 1}),
    ("GotOcr2ImageProcessor", TILED | {"min_patches": 3, "max_patches": 12}),
    ("GotOcr2ImageProcessor", TILED | {"size": {"height": 24, "width": 40}}),
    ("PixtralImageProcessor", PATCHED | {"size": {"height": 64, "width": 100}}),
    ("PixtralImageProcessor", {}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value)[:60])
def test_pixels_are_transformers(name: str, options: dict[str, Any], pictures: dict[str, Image.Image]) -> None:
    processor = load_image_processor({"image_processor_type": name, **options})
    reference = REFERENCE[name](**options)
    some = list(pictures.items()) if len(options) > 2 else list(pictures.items())[::4]
    for label, image in some:
        if options.get("do_convert_rgb") is False and image.mode not in ("L", "RGB"):
            continue  # refused: which channels it has is not the processor's to say
        try:
            expected = reference(image, return_tensors="np")
        except ValueError:
            with pytest.raises(ImageError):
                processor(image)
            continue
        encoded = processor(image)
        values = encoded.arrays["pixel_values"]
        wanted = expected["pixel_values"][0] if name.startswith("Llava") else expected["pixel_values"]
        if name == "PixtralImageProcessor":
            height, width = expected["image_sizes"][0]
            assert encoded.grid == (1, height // processor.patch, width // processor.patch), label
            values = _image(values, encoded.grid, processor.patch)
        else:
            assert encoded.tiles == len(values), label
        assert values.dtype == np.float32, label
        assert values.shape == wanted.shape, label
        np.testing.assert_array_equal(values, wanted.astype(np.float32), err_msg=label)


def _image(patches: np.ndarray, grid: tuple[int, int, int], side: int) -> np.ndarray:
    """The image that was cut into patches."""
    _, rows, columns = grid
    squares = patches.reshape(rows, columns, -1, side, side).transpose(2, 0, 3, 1, 4)
    return squares.reshape(1, -1, rows * side, columns * side)


def test_pixtral_follows_its_joint_processor(photographs: dict[str, Image.Image]) -> None:
    """PixtralProcessor makes sides multiples of merged patches, whatever patch size the image processor has of its own."""
    config = {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 100}, "patch_size": 16}
    ours = load_image_processor(config, {"processor_class": "PixtralProcessor", "patch_size": 7, "spatial_merge_size": 2})
    reference = PixtralImageProcessorPil(size={"longest_edge": 100}, patch_size=16)
    for label, image in photographs.items():
        expected = reference(image, patch_size=7 * 2, return_tensors="np")["pixel_values"]
        found = ours(image)
        assert found.grid is not None
        np.testing.assert_array_equal(_image(found.arrays["pixel_values"], found.grid, 7), expected, err_msg=label)


@pytest.mark.parametrize("joint", ["InternVLProcessor", "AyaVisionProcessor"])
def test_some_processors_tile_whatever_the_file_says(joint: str, photographs: dict[str, Image.Image]) -> None:
    config = {"image_processor_type": "GotOcr2ImageProcessor", **TILED, "crop_to_patches": False}
    encoded = load_image_processor(config, {"processor_class": joint})(photographs["coffee.png"])
    expected = GotOcr2ImageProcessorPil(**TILED)(photographs["coffee.png"], return_tensors="np")
    assert encoded.tiles == int(expected["num_patches"][0]) > 1


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("LlavaNextImageProcessor", {"image_grid_pinpoints": [[32]]}, "image_grid_pinpoints"),
        ("LlavaNextImageProcessor", {"size": {"longest_edge": 3}}, "shortest_edge"),
        ("GotOcr2ImageProcessor", {"size": {"shortest_edge": 3}}, "height"),
        ("GotOcr2ImageProcessor", {"max_patches": 0}, "max_patches"),
        ("PixtralImageProcessor", {"patch_size": {"height": 8, "width": 9}}, "patch_size"),
        ("PixtralImageProcessor", {"size": {"shortest_edge": 9}}, "longest_edge"),
    ],
)
def test_what_cannot_be_honoured_is_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        load_image_processor({"image_processor_type": name, **options})


@pytest.mark.parametrize("most", [1, 4, 12])
def test_command_a_visions_tiles_are_those_of_its_processor(most: int) -> None:
    """Its module needs torchvision; the rule, as its `get_optimal_tiled_canvas` computes it, is spelt out with numpy."""
    grids = sorted(
        ((w, h) for w in range(1, most + 1) for h in range(1, most + 1) if w * h <= most), key=lambda one: one[0] * one[1]
    )
    generator = np.random.default_rng(0)
    for height, width in [(32, 32), (64, 64), (8, 8), *generator.integers(1, 400, (200, 2)).tolist()]:
        scales = (np.array(grids) * 32 / np.stack([width, height])).min(-1, keepdims=True)
        if (scales < 1).all():
            expected = grids[int(scales.argmax())]
        else:
            expected = grids[int(np.where(scales < 1.0, 10e9, scales).argmin())]
        assert least_scaled_arrangement(height, width, 32, most) == expected[::-1], (height, width)
