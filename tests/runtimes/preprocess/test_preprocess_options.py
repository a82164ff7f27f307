"""Processor names and options: what is found by which name, and that nothing unknown passes in silence."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from vlm_edge_runtime.errors import ImageError, UnsupportedModelError
from vlm_edge_runtime.preprocess import load_image_processor
from vlm_edge_runtime.preprocess.idefics3 import Idefics3ImageProcessor

CLIP = {"image_processor_type": "CLIPImageProcessor"}
QWEN = {"image_processor_type": "Qwen2VLImageProcessor"}
TILES = {"image_processor_type": "Idefics3ImageProcessor"}


@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
def test_suffixes_name_the_same_processor(suffix: str) -> None:
    one = load_image_processor({"image_processor_type": "SmolVLMImageProcessor" + suffix})
    assert isinstance(one, Idefics3ImageProcessor)
    assert one.fingerprint == load_image_processor({"image_processor_type": "SmolVLMImageProcessor"}).fingerprint


def test_older_files_name_a_feature_extractor() -> None:
    # As openai/clip-vit-base-patch32 was published.
    config = {
        "crop_size": 224,
        "do_center_crop": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "resample": 3,
        "size": 224,
    }
    assert load_image_processor(config).fingerprint == load_image_processor(CLIP).fingerprint


def test_nested_processor_config_goes_first() -> None:
    processor = load_image_processor(CLIP, {"image_processor": {**TILES, "resample": 2}, "image_seq_len": 7})
    assert processor.options.resample == 2
    encoded = processor(Image.new("RGB", (1456, 728)))
    assert (encoded.rows, encoded.columns, encoded.tiles, encoded.tokens) == (2, 4, 9, 63)


def test_tokens_of_a_fixed_grid() -> None:
    files = {"patch_size": 16, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    image = Image.new("RGB", (300, 200))
    assert load_image_processor(CLIP, files)(image).tokens == 14 * 14
    assert load_image_processor(CLIP, files | {"vision_feature_select_strategy": "full"})(image).tokens == 14 * 14 + 1
    assert load_image_processor(CLIP)(image).tokens is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "names no image_processor_type"),
        ({"image_processor_type": "FuyuImageProcessor"}, "'FuyuImageProcessor' is not known"),
        ({"image_processor_type": "Qwen2_5_VLImageProcessor"}, "nearest is Qwen2VLImageProcessor"),
        (CLIP | {"offset": True}, "not known here and may change the pixels: offset=True"),
        (CLIP | {"do_sharpen": True, "gamma": 2.2}, "do_sharpen=True, gamma=2.2"),
        (CLIP | {"resample": "bicubic"}, "resample='bicubic'.*Pillow filter number"),
        (CLIP | {"resample": 6}, "resample=6"),
        (CLIP | {"resample": None}, "resample=None"),
        (CLIP | {"size": {"longest_edge": 224}}, "size of CLIPImageProcessor must give"),
        (CLIP | {"size": None}, "size of CLIPImageProcessor must give"),
        (CLIP | {"size": {"height": 224}}, "exactly the keys"),
        (CLIP | {"size": {"height": 224, "width": 0}}, "positive integers"),
        (CLIP | {"size": "224"}, "size='224'"),
        (CLIP | {"crop_size": {"shortest_edge": 224}}, "crop_size of CLIPImageProcessor must give"),
        (CLIP | {"crop_size": None}, "crop_size of CLIPImageProcessor must give"),
        (CLIP | {"do_normalize": "yes"}, "true or false"),
        (CLIP | {"image_std": [0.5, 0, 0.5]}, "other than 0"),
        (CLIP | {"image_mean": "0.5"}, "one number per channel"),
        (CLIP | {"image_mean": None}, "one number per channel"),
        (CLIP | {"rescale_factor": None}, "a number"),
        (TILES | {"max_image_size": {"height": 4}}, "max_image_size.*longest_edge"),
        (TILES | {"max_image_size": {"longest_edge": 0}}, "max_image_size"),
        (TILES | {"size": {"shortest_edge": 300}}, "longest_edge"),
        (QWEN | {"size": {"min_pixels": 4, "max_pixels": 9}}, "shortest_edge"),
        (QWEN | {"patch_size": 0}, "patch_size=0"),
        (
            {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "image_mean": 0.5, "image_std": 0.5},
            "one number per channel",
        ),
    ],
    ids=repr,
)
def test_refused_when_loading(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        load_image_processor(config)


@pytest.mark.parametrize(
    "harmless",
    [
        {"offset": False, "gamma": None},
        {"processor_class": "X", "auto_map": {}, "_valid_processor_keys": ["size"], "device": "cuda", "use_fast": True},
        {"image_seq_len": 64, "video_sampling": {"fps": 1}},
    ],
    ids=repr,
)
def test_what_cannot_change_pixels_is_let_through(harmless: dict[str, Any]) -> None:
    assert load_image_processor(CLIP | harmless).fingerprint == load_image_processor(CLIP).fingerprint


def test_fingerprint_tells_options_apart() -> None:
    configs: list[dict[str, Any]] = [
        CLIP,
        QWEN,
        TILES,
        CLIP | {"resample": 2},
        CLIP | {"size": 225},
        CLIP | {"image_mean": [0.5, 0.5, 0.5]},
        TILES | {"do_image_splitting": False},
        TILES | {"max_image_size": {"longest_edge": 365}},
        QWEN | {"max_pixels": 10_000},
        QWEN | {"merge_size": 1},
    ]
    assert len({load_image_processor(config).fingerprint for config in configs}) == len(configs)


def test_grey_without_conversion_names_the_channels() -> None:
    processor = load_image_processor(CLIP | {"do_convert_rgb": False})
    with pytest.raises(ImageError, match="1 channel and CLIPImageProcessor normalises 3"):
        processor(Image.new("L", (300, 300)))
    with pytest.raises(ImageError, match="mode 'P'"):
        processor(Image.new("P", (300, 300)))
    with pytest.raises(ImageError, match="multiples of 28"):
        load_image_processor(QWEN | {"do_resize": False})(Image.new("RGB", (30, 30)))
