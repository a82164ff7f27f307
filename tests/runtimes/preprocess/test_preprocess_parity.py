"""Our processors against transformers' own (its PIL backends), on real photographs and over every option they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessorPil,
    Idefics3ImageProcessorPil,
    LlavaImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
)
from transformers.vision_utils import get_vision_position_ids

from vlm_edge_runtime.errors import ImageError
from vlm_edge_runtime.preprocess import load_image_processor, ops

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
REFERENCE = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "Idefics3ImageProcessor": Idefics3ImageProcessorPil,
    "SmolVLMImageProcessor": SmolVLMImageProcessorPil,
    "Qwen2VLImageProcessor": Qwen2VLImageProcessorPil,
}
SMALL = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 48}}
TILED = {"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 64}}
AREA = {"size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 60}}


def compare(config: dict[str, Any], reference: Any, image: Image.Image) -> None:
    """The same numbers, or an error from both."""
    processor = load_image_processor(config)
    name = config["image_processor_type"]
    extra = {"return_row_col_info": True} if name in ("Idefics3ImageProcessor", "SmolVLMImageProcessor") else {}
    try:
        expected = reference(image, return_tensors="np", **extra)
    except (ValueError, ZeroDivisionError):
        with pytest.raises(ImageError):
            processor(image)
        return
    encoded = processor(image)
    values = encoded.arrays["pixel_values"]
    assert encoded.size == (image.height, image.width)
    assert values.dtype == np.float32 and values.flags.c_contiguous
    if extra:
        assert (encoded.rows, encoded.columns) == (expected["rows"][0][0], expected["cols"][0][0])
        assert encoded.tiles == len(values)
        reference_values = expected["pixel_values"][0]
    elif name == "Qwen2VLImageProcessor":
        assert [list(encoded.grid or ())] == expected["image_grid_thw"].tolist()
        assert encoded.tokens == int(expected["image_grid_thw"].prod()) // processor.merge**2
        positions = get_vision_position_ids(torch.from_numpy(expected["image_grid_thw"]), processor.merge)
        np.testing.assert_array_equal(encoded.arrays["position_ids"], positions.numpy())
        reference_values = expected["pixel_values"]
    else:
        # IDEFICS's gives the numbers by themselves.
        reference_values = expected if isinstance(expected, np.ndarray) else expected["pixel_values"]
    assert values.shape == reference_values.shape
    # Stricter than the promised 1e-6: the arithmetic is the same, operation for operation.
    np.testing.assert_array_equal(values, reference_values.astype(np.float32))


PIXEL_OPTIONS = [
    {},
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 0.9, 0.8], "image_std": [0.3, 0.2, 0.1]},
    {"image_mean": 0.4, "image_std": 0.25},
    {"do_convert_rgb": False},
    *({"resample": number} for number in range(6)),
]
CROP_OPTIONS = [
    {"do_resize": False},
    {"do_center_crop": False},
    {"do_resize": False, "do_center_crop": True, "crop_size": 333},
    {"size": 60},
    {"size": [40, 70], "do_center_crop": False},
    {"size": {"height": 50, "width": 90}},
    {"size": 60, "default_to_square": True},
    {"size": {"shortest_edge": 40, "longest_edge": 55}, "do_center_crop": True, "crop_size": 41},
    {"size": {"max_height": 70, "max_width": 90}, "do_center_crop": False},
    {"crop_size": 33, "do_center_crop": True},
    {"do_center_crop": None, "do_normalize": None, "do_rescale": None, "image_mean": None, "resample": 2},
    {"do_resize": None, "size": None, "resample": None, "do_center_crop": True, "crop_size": 40},
    {"do_pad": True, "do_center_crop": True, "crop_size": 44, "pad_size": {"height": 80, "width": 81}},
    {"do_pad": True, "do_center_crop": True, "crop_size": 44, "pad_size": 30},
    {"do_pad": True},
]
LLAVA_OPTIONS = [
    {"do_pad": True, "image_mean": [0.1, 0.5, 0.9]},
    {"do_pad": True, "image_mean": None, "do_normalize": False},
    {"do_pad": True, "do_normalize": False, "do_rescale": False, "pad_size": 7},
]
CASES = [
    *(("CLIPImageProcessor", SMALL | options) for options in PIXEL_OPTIONS + CROP_OPTIONS),
    ("CLIPImageProcessor", {"use_square_size": True, "do_center_crop": False}),
    *(("LlavaImageProcessor", SMALL | options) for options in [*CROP_OPTIONS, *LLAVA_OPTIONS]),
    *(("SiglipImageProcessor", {"size": {"height": 64, "width": 48}} | options) for options in PIXEL_OPTIONS[:5] + CROP_OPTIONS),
    *(("Idefics3ImageProcessor", TILED | options) for options in PIXEL_OPTIONS),
    *(
        ("Idefics3ImageProcessor", TILED | options)
        for options in (
            {"do_image_splitting": False},
            {"do_pad": False},
            {"do_resize": False},
            {"do_resize": None, "resample": None},
            {"do_resize": False, "do_image_splitting": False},
            {"size": {"height": 100, "width": 200}},
            {"size": 130},
            {"size": {"longest_edge": 60}},
            {"max_image_size": {"longest_edge": 100}},
        )
    ),
    ("SmolVLMImageProcessor", TILED),
    *(("Qwen2VLImageProcessor", AREA | options) for options in PIXEL_OPTIONS),
    *(
        ("Qwen2VLImageProcessor", options)
        for options in (
            {"min_pixels": 28 * 28 * 9, "max_pixels": 28 * 28 * 20},
            {"max_pixels": 28 * 28 * 20},
            AREA | {"min_pixels": 28 * 28 * 30},
            AREA | {"patch_size": 16, "merge_size": 1, "temporal_patch_size": 1},
            AREA | {"patch_size": 7, "merge_size": 3, "temporal_patch_size": 3},
        )
    ),
]


@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:70]
)
def test_options(name: str, options: dict[str, Any], pictures: dict[str, Image.Image]) -> None:
    reference = REFERENCE[name](**options)
    for picture in ("astronaut.png", "coffee.png", "grey", "odd", "one-pixel"):
        image = pictures[picture]
        if options.get("do_resize") is False:
            image = image.crop((0, 0, min(image.width, 230), min(image.height, 260)))
        compare({"image_processor_type": name, **options}, reference, image)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("CLIPImageProcessor", {}),
        ("SiglipImageProcessor", {}),
        ("SmolVLMImageProcessor", {"size": {"longest_edge": 512}, "max_image_size": {"longest_edge": 128}}),
        ("Qwen2VLImageProcessor", {"max_pixels": 28 * 28 * 300}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_picture(name: str, options: dict[str, Any], pictures: dict[str, Image.Image]) -> None:
    reference = REFERENCE[name](**options)
    for image in pictures.values():
        compare({"image_processor_type": name, **options}, reference, image)


def test_defaults_are_those_of_the_class(photographs: dict[str, Image.Image]) -> None:
    for name, reference in REFERENCE.items():
        saved = json.loads(reference().to_json_string())
        compare(saved, reference(), photographs["chelsea.png"])
        assert load_image_processor(saved).fingerprint == load_image_processor({"image_processor_type": name}).fingerprint


CLIP_NUMBERS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
STEPS = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 0.00392156862745098}
PUBLISHED = {
    "clip-vit-base-patch32": {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3}
    | {"size": 224, "feature_extractor_type": "CLIPFeatureExtractor"}
    | CLIP_NUMBERS,
    "llava-1.5-7b-hf": {"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}, "do_center_crop": True}
    | {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "resample": 3, "do_convert_rgb": True}
    | {"_valid_processor_keys": ["images", "do_resize", "size"]}
    | STEPS
    | CLIP_NUMBERS,
    "siglip-so400m-patch14-384": {"image_processor_type": "SiglipImageProcessor", "resample": 3}
    | {"size": {"height": 384, "width": 384}, "processor_class": "SiglipProcessor"}
    | STEPS
    | HALVES,
    "SmolVLM2-256M": {"image_processor_type": "SmolVLMImageProcessor", "do_image_splitting": True, "do_pad": True, "resample": 1}
    | {"max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048}, "do_convert_rgb": True}
    | {"video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}}}
    | STEPS
    | HALVES,
    "Qwen2-VL-2B": {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14}
    | {"temporal_patch_size": 2, "merge_size": 2, "processor_class": "Qwen2VLProcessor"}
    | CLIP_NUMBERS,
    "Qwen2.5-VL-3B": {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},
    }
    | {"device": None, "disable_grouping": None, "data_format": "channels_first"}
    | CLIP_NUMBERS,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_as_published(name: str, tmp_path: Path, photographs: dict[str, Image.Image]) -> None:
    config: dict[str, Any] = PUBLISHED[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    reference = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    kind = type(reference).__name__.removesuffix("Pil")
    compare({**config, "image_processor_type": kind}, reference, photographs["astronaut.png"])
    assert load_image_processor(config).name == kind


def test_numpy_without_native_code(monkeypatch: pytest.MonkeyPatch, pictures: dict[str, Image.Image]) -> None:
    monkeypatch.setattr(ops, "native", None)
    for name, options in (("CLIPImageProcessor", SMALL), ("SmolVLMImageProcessor", TILED), ("Qwen2VLImageProcessor", AREA)):
        for resample in range(6):
            changed = options | {"resample": resample}
            compare({"image_processor_type": name, **changed}, REFERENCE[name](**changed), pictures["coffee.png"])
        compare({"image_processor_type": name, **options}, REFERENCE[name](**options), pictures["one-pixel"])


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in CHECKPOINTS.glob("*/preprocessor_config.json")))
def test_checkpoints(folder: str, photographs: dict[str, Image.Image]) -> None:
    reference = AutoImageProcessor.from_pretrained(CHECKPOINTS / folder, backend="pil")
    config = json.loads((CHECKPOINTS / folder / "preprocessor_config.json").read_text())
    for image in photographs.values():
        compare(config, reference, image)


def test_array_of_rgba_is_composited_as_transformers_does(pictures: dict[str, Image.Image]) -> None:
    pixels = np.asarray(pictures["rgba"])
    expected = CLIPImageProcessorPil(**SMALL)(pixels, return_tensors="np")["pixel_values"]
    processor = load_image_processor({"image_processor_type": "CLIPImageProcessor", **SMALL})
    np.testing.assert_array_equal(processor(pixels).arrays["pixel_values"], expected)


def test_slivers_beyond_memory_are_refused(pictures: dict[str, Image.Image]) -> None:
    processor = load_image_processor({"image_processor_type": "CLIPImageProcessor"})
    with pytest.raises(ImageError, match="would become 1792000 × 224"):
        processor(Image.new("RGB", (8000, 1)))
    with pytest.raises(ImageError, match="more than 200 times"):
        load_image_processor({"image_processor_type": "Qwen2VLImageProcessor"})(Image.new("RGB", (1, 300)))
