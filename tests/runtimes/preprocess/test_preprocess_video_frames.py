"""Which frames of a video are taken, at what size, in what order of patches: transformers' own methods.

Its video processors cannot be imported without torchvision; their methods are read out of its sources and called on a stand-in
that has their options. Resizing alone is not compared: there it is torchvision's, here Pillow's.
"""

from __future__ import annotations

import ast
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from vlm_edge_runtime.errors import ImageError, UnsupportedModelError
from vlm_edge_runtime.preprocess.ops import cut
from vlm_edge_runtime.preprocess.video import VIDEO_PROCESSORS, load_video_processor

MODELS = Path(transformers.__file__).parent / "models"


def methods(name: str) -> SimpleNamespace:
    """The functions and methods of a model's video processor, whose parent's `resize` is `asked`."""
    source = (MODELS / name / f"video_processing_{name}.py").read_text()
    tree = ast.parse(source.replace("super().resize(", "asked("))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    for node in found:
        node.decorator_list = []
    namespace: dict[str, Any] = {
        "torch": torch,
        "np": np,
        "math": math,
        "SizeDict": SizeDict,
        "asked": lambda image, size, resample: size,
    }
    names = "from __future__ import annotations"
    exec(compile(ast.Module([*ast.parse(names).body, *found], []), name, "exec"), namespace)
    return SimpleNamespace(**namespace)


internvl, qwen2, qwen3 = methods("internvl"), methods("qwen2_vl"), methods("qwen3_vl")
QWEN = {"patch_size": 8, "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}}
TOTALS = [2, 3, 4, 7, 10, 24, 31, 100, 333]


def made(kind: str, **options: Any):
    return VIDEO_PROCESSORS[kind]({"video_processor_type": kind, **options})


def outcome(call) -> list[int] | None:
    """Indices, or None where it refuses."""
    try:
        return [int(index) for index in call()]
    except (ValueError, ImageError, ZeroDivisionError):
        return None


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("options", [{"num_frames": 2}, {"num_frames": 7}, {"num_frames": 9}, {"fps": 2}, {"fps": 0.5}, {}])
@pytest.mark.parametrize("fps", [24.0, 29.97, 4.0])
@pytest.mark.parametrize(
    "kind", ["LlavaOnevisionVideoProcessor", "InternVLVideoProcessor", "Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor"]
)
def test_the_chosen_frames(kind: str, total: int, options: dict[str, Any], fps: float) -> None:
    metadata = VideoMetadata(total_num_frames=total, fps=fps)
    ours = made(kind, do_sample_frames=True, **options)
    # The classes' own defaults, which a stand-in has to have.
    stand_in = SimpleNamespace(
        num_frames=None,
        fps=2 if kind.startswith("Qwen3") else None,
        temporal_patch_size=2,
        min_frames=4,
        max_frames=768,
        initial_shift=True,
    )
    reference = {
        "LlavaOnevisionVideoProcessor": lambda: default_sample_indices_fn(metadata, **options),
        "InternVLVideoProcessor": lambda: internvl.sample_frames(stand_in, metadata, **options),
        "Qwen2VLVideoProcessor": lambda: qwen2.sample_frames(stand_in, metadata, **options),
        "Qwen3VLVideoProcessor": lambda: qwen3.sample_frames(
            SimpleNamespace(**{**vars(stand_in), "fps": None}) if "num_frames" in options else stand_in, metadata, **options
        ),
    }[kind]
    if not options and not kind.startswith(("Qwen3", "Llava")):
        return  # nothing says how many: theirs fails
    assert outcome(lambda: ours.chosen(total, fps)) == outcome(reference)


@pytest.mark.parametrize("capped", [None, True])
@pytest.mark.parametrize(("frames", "height", "width"), [(2, 40, 60), (5, 200, 33), (12, 90, 90), (30, 17, 300), (3, 7, 9)])
def test_sizes(frames: int, height: int, width: int, capped: bool | None) -> None:
    video, bounds = torch.zeros(1, frames, 3, height, width), SizeDict(**QWEN["size"])
    for kind, module in (("Qwen2VLVideoProcessor", qwen2), ("Qwen3VLVideoProcessor", qwen3)):
        stand_in = SimpleNamespace(max_video_tokens=20)
        expected = module.resize(stand_in, video, bounds, 3, 16, temporal_factor=2, cap_pixels_per_frame=capped)
        ours = made(kind, cap_pixels_per_frame=capped, max_video_tokens=20, **QWEN)
        assert ours.target(frames, height, width) == (expected.height, expected.width), kind


@pytest.mark.parametrize("frames", [1, 2, 5, 6])
def test_order_of_patches(frames: int) -> None:
    ours = made("Qwen2VLVideoProcessor", **QWEN)
    planes = np.random.default_rng(0).normal(size=(frames, 3, 32, 48)).astype(np.float32)
    patchify = qwen2.patchify
    expected, time, _, _ = patchify(None, torch.from_numpy(planes)[None], patch_size=8, merge_size=2, temporal_patch_size=2)
    np.testing.assert_array_equal(cut(planes, ours._images.patches), expected[0].numpy())
    assert time == -(-frames // 2)


def test_a_video_of_patches() -> None:
    images = [Image.fromarray(np.full((40, 56, 3), 9 * number, np.uint8)) for number in range(9)]
    found = made("Qwen2VLVideoProcessor", do_sample_frames=True, num_frames=6, **QWEN)(images, fps=3.0)
    assert found.grid is not None
    assert found.grid[0] == 3
    patches = found.grid[1] * found.grid[2]
    assert found.arrays["pixel_values"].shape == (3 * patches, 3 * 2 * 64)
    assert found.arrays["position_ids"].shape == (3 * patches, 2)
    assert found.seconds_per_step == pytest.approx(2 / (6 / 9 * 3.0))
    assert found.timestamps == pytest.approx([0.5 / 3, 3.5 / 3, 6.5 / 3])  # frames 0, 1; 3, 4; 6, 7
    three = made("Qwen3VLVideoProcessor", do_sample_frames=False, **QWEN)(images[:5])
    assert three.grid is not None and three.grid[0] == 3
    assert three.timestamps == pytest.approx([0.5 / 24, 2.5 / 24, 4 / 24])


def test_a_video_of_frames() -> None:
    images = [Image.fromarray(np.full((20, 30, 3), 20 * number, np.uint8)) for number in range(8)]
    found = made(
        "InternVLVideoProcessor", do_sample_frames=True, num_frames=4, size={"height": 16, "width": 16}, do_normalize=False
    )(images)
    assert found.tiles == 4
    np.testing.assert_allclose(found.arrays["pixel_values"][:, 0, 0, 0] * 255 / 20, [1, 3, 5, 7], atol=1e-5)


def test_what_is_refused() -> None:
    images = [Image.new("RGB", (20, 20))] * 3
    with pytest.raises(ImageError, match="takes 4 frames and the video has 3"):
        made("LlavaOnevisionVideoProcessor", do_sample_frames=True, num_frames=4)(images)
    with pytest.raises(ImageError, match="pass its fps"):
        made("Qwen2VLVideoProcessor", do_sample_frames=True, fps=2, **QWEN)(images)
    with pytest.raises(UnsupportedModelError, match="set one of them to null"):
        made("Qwen2VLVideoProcessor", do_sample_frames=True, fps=2, num_frames=4, **QWEN)
    with pytest.raises(UnsupportedModelError, match="colour_space"):
        made("Qwen2VLVideoProcessor", colour_space="lab", **QWEN)


def test_a_bundle_names_it() -> None:
    class Files:
        def has_file(self, name: str) -> bool:
            return name == "video_preprocessor_config.json"

        def read_json(self, name: str) -> dict[str, Any]:
            return {"video_processor_type": "Qwen3VLVideoProcessor", **QWEN}

    assert getattr(load_video_processor(Files()), "name", "") == "Qwen3VLVideoProcessor"
