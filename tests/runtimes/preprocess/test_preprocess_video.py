"""Video processors: which frames are taken, and that each is what the image processor makes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipImageProcessorPil
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from vlm_edge_runtime.errors import UnsupportedModelError
from vlm_edge_runtime.preprocess import load_video_processor
from vlm_edge_runtime.preprocess.video import uniform_frames

SIZE = {"height": 48, "width": 40}
SAVED = {"video_processor_type": "InstructBlipVideoVideoProcessor", "size": SIZE, "do_sample_frames": False, "num_frames": None}


class Files:
    def __init__(self, **files: dict[str, Any]) -> None:
        self.files = {f"{name}.json": content for name, content in files.items()}

    def has_file(self, name: str) -> bool:
        return name in self.files

    def read_json(self, name: str) -> dict[str, Any]:
        return self.files[name]


def frames(count: int) -> list[Image.Image]:
    random = np.random.default_rng(3)
    return [Image.fromarray(random.integers(0, 255, (90, 70, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 7, 16, 100, 1001])
@pytest.mark.parametrize("wanted", [4, 8])
def test_frames_at_even_distances(total: int, wanted: int) -> None:
    expected = np.arange(0, total, total / wanted).astype(int)
    assert uniform_frames(total, wanted) == expected[:wanted].tolist()
    assert len(uniform_frames(total, wanted)) == wanted
    if total >= wanted:
        sampled = default_sample_indices_fn(VideoMetadata(total_num_frames=total), num_frames=wanted)
        assert uniform_frames(total, wanted) == sampled.tolist()


@pytest.mark.parametrize("count", [1, 3, 4, 11])
def test_frames_are_blips_images(count: int) -> None:
    processor, given = load_video_processor(Files(video_preprocessor_config=SAVED)), frames(count)
    encoded = processor(given)
    chosen = [given[index] for index in uniform_frames(count, 4)]
    expected = BlipImageProcessorPil(size=SIZE)(chosen, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(encoded.arrays["pixel_values"], expected)
    assert encoded.arrays["pixel_values"].shape == (4, 3, 48, 40)
    assert encoded.tiles == 4


def test_torchs_own_resizing_differs_by_a_level_at_most() -> None:
    """What transformers' class does to frames, in the torch function that torchvision calls."""
    given = frames(4)
    values = load_video_processor(Files(video_preprocessor_config={**SAVED, "do_normalize": False}))(given).arrays["pixel_values"]
    stacked = torch.from_numpy(np.stack([np.asarray(frame) for frame in given])).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(stacked, (48, 40), mode="bicubic", antialias=True)
    assert np.abs(values * 255 - resized.numpy()).max() <= 1.001


def test_older_files() -> None:
    given = frames(4)
    expected = load_video_processor(Files(video_preprocessor_config=SAVED))(given).arrays["pixel_values"]
    for kind in ("BlipImageProcessor", "InstructBlipVideoImageProcessor"):
        processor = load_video_processor(Files(preprocessor_config={"image_processor_type": kind, "size": SIZE}))
        np.testing.assert_array_equal(processor(given).arrays["pixel_values"], expected)
    assert load_video_processor(Files()) is None
    assert load_video_processor(Files(video_preprocessor_config={"video_processor_type": "SomeVideoProcessor"})) is None


def test_other_numbers_of_frames_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="takes 8 frames"):
        load_video_processor(Files(video_preprocessor_config={**SAVED, "do_sample_frames": True, "num_frames": 8}))


def test_another_option_is_another_fingerprint() -> None:
    one, other = (load_video_processor(Files(video_preprocessor_config={**SAVED, "resample": n})) for n in (2, 3))
    assert one.fingerprint != other.fingerprint
