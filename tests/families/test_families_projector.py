"""What family `projector` writes into the manifest for images of any size, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
from tiny.visual_tokens import BINS, HIGH, LOW

from vlm_edge.export import checkpoint
from vlm_edge_runtime.bundle.manifest import (
    ActionTokens,
    FixedPlaceholder,
    GridPlaceholder,
    MRopePositions,
    SequentialPositions,
    TokenInput,
)
from vlm_edge_runtime.bundle.reader import read_manifest
from vlm_edge_runtime.bundle.vision_layout import (
    AnyResolutionPlaceholder,
    FramedTilesPlaceholder,
    InterpolationGeometry,
    LabelledFramesPlaceholder,
    MergeGeometry,
    PatchRowsPlaceholder,
    PooledFramesPlaceholder,
    TimedFramesPlaceholder,
    WindowGeometry,
)
from vlm_edge_runtime.errors import UnsupportedModelError

SIDE = tiny.IMAGE // tiny.PATCH


def shapes(manifest, role: str) -> dict[str, tuple[int | str, ...]]:
    return {spec.name: spec.shape for spec in (*manifest.graphs[role].inputs, *manifest.graphs[role].outputs)}


def test_llava_next(portable_bundle) -> None:
    manifest = read_manifest(portable_bundle("llava_next"))
    (image,) = manifest.contract.modalities
    assert image.placeholder == AnyResolutionPlaceholder(image_token="<image>", side=SIDE)
    assert image.batch == "tile"
    assert shapes(manifest, "vision_encoder")["pixel_values"] == ("tiles", 3, 32, 32)
    # The end of a line is one more row for every tile.
    assert shapes(manifest, "projector")["image_features"] == ("tiles", SIDE**2 + 1, tiny.WIDTH)


def test_qwen2_5_vl(portable_bundle) -> None:
    manifest = read_manifest(portable_bundle("qwen2_5_vl"))
    image, video = manifest.contract.modalities
    assert image.geometry == video.geometry == [WindowGeometry(merge=2, window=2)]
    assert isinstance(image.placeholder, GridPlaceholder)
    assert (video.kind, video.graphs, video.batch) == ("video", image.graphs, "patches")
    assert video.placeholder.image_token == "<|video_pad|>"
    assert isinstance(manifest.contract.positions, MRopePositions)
    assert manifest.contract.positions.tokens_per_second == 2
    assert {"patch_order", "window_ids"} <= shapes(manifest, "vision_encoder").keys()
    assert shapes(manifest, "projector")["token_order"] == ("tokens",)


def test_qwen3_vl(portable_bundle) -> None:
    manifest = read_manifest(portable_bundle("qwen3_vl"))
    image, video = manifest.contract.modalities
    assert image.geometry == [InterpolationGeometry(merge=2, side=5)]
    assert isinstance(video.placeholder, TimedFramesPlaceholder)
    assert manifest.contract.token_inputs == [TokenInput(name=f"deepstack.{number}", kind="features") for number in (0, 1)]
    assert shapes(manifest, "projector")["deepstack.1"] == ("tokens", tiny.WIDTH)
    assert shapes(manifest, "decoder")["deepstack.0"] == ("batch", "sequence", tiny.WIDTH)
    assert shapes(manifest, "vision_encoder")["interpolation_weights"] == ("patches", 4)


@pytest.mark.slow
def test_llava_onevision(portable_bundle) -> None:
    image, video = read_manifest(portable_bundle("llava_onevision")).contract.modalities
    assert image.placeholder == AnyResolutionPlaceholder(image_token="<image>", side=SIDE, max_tiles=2)
    assert video.placeholder == PooledFramesPlaceholder(image_token="<video>", side=SIDE)
    assert video.token_id != image.token_id


@pytest.mark.slow
def test_internvl(portable_bundle) -> None:
    image, video = read_manifest(portable_bundle("internvl")).contract.modalities
    frame = {"start_token": "<img>", "end_token": "</img>"}
    assert image.placeholder == FramedTilesPlaceholder(image_token="<IMG_CONTEXT>", tokens_per_tile=SIDE**2 // 4, **frame)
    assert video.placeholder == LabelledFramesPlaceholder(
        image_token="<video>", frame_token="<IMG_CONTEXT>", tokens_per_frame=SIDE**2 // 4, **frame
    )
    assert video.token_id == image.token_id, "a frame's features stand at an image's tokens"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "merge"), [("pixtral", 1), ("mistral3", 2), ("lighton_ocr", 2)])
def test_rows_of_patches(name: str, merge: int, portable_bundle) -> None:
    manifest = read_manifest(portable_bundle(name))
    (image,) = manifest.contract.modalities
    if name == "lighton_ocr":
        assert image.placeholder == GridPlaceholder(image_token="[IMG]", merge_size=2)
    else:
        assert image.placeholder == PatchRowsPlaceholder(
            image_token="[IMG]", break_token="[IMG_BREAK]", end_token="[IMG_END]", merge=merge
        )
    assert image.geometry == ([MergeGeometry(merge=merge)] if merge > 1 else [])
    assert shapes(manifest, "vision_encoder")["pixel_values"] == ("patches", 3 * tiny.PATCH**2)


def test_palm_e(portable_bundle) -> None:
    manifest = read_manifest(portable_bundle("palm_e"))
    contract = manifest.contract
    image, state = contract.modalities
    assert image.placeholder == FixedPlaceholder(image_token="<image>", tokens_per_image=SIDE**2)
    assert (state.kind, state.graphs, state.placeholder.image_token) == ("state", ["state_encoder"], "<state>")
    assert contract.actions == ActionTokens(first_token=tiny.VOCABULARY - BINS, bins=BINS, low=LOW, high=HIGH)
    assert isinstance(contract.positions, SequentialPositions)
    assert shapes(manifest, "state_encoder") == {"states": ("states", 6), "state_features": ("states", tiny.WIDTH)}


@pytest.fixture
def changed(tmp_path, tiny_checkpoint):
    """`changed(name, file, **values)` → a copy of a checkpoint with other values in one of its files."""

    def make(name: str, file: str, **values: object):
        folder = tmp_path / name
        shutil.copytree(tiny_checkpoint(name), folder)
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | values))
        config, entry, family = checkpoint.identify(folder, None, False)
        return lambda: family.split(checkpoint.load(folder, family.auto_class, config), entry)

    return make


@pytest.mark.parametrize(
    ("name", "file", "values", "said"),
    [
        ("llava_next", "preprocessor_config.json", {"image_grid_pinpoints": [[32, 64]]}, "image_grid_pinpoints.*make them equal"),
        ("llava_next", "config.json", {"vision_feature_select_strategy": "full"}, "17 features.*class token"),
        ("pixtral", "processor_config.json", {"image_break_token": "[BREAK]"}, r"no token '\[BREAK\]'"),
        ("palm_e", "config.json", {"state_token_id": 4000}, "no token 4000"),
        (
            "palm_e",
            "config.json",
            {"action_tokens": {"first_token": 1, "bins": 4, "low": [0.0], "high": [0.0]}},
            "action_tokens.*as many",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(name, file, values, said, changed) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        changed(name, file, **values)()


def test_a_checkpoint_without_a_video_processor_takes_no_videos(changed) -> None:
    split = changed("qwen2_5_vl", "processor_config.json", video_processor=None)()
    assert [modality.kind for modality in split.contract.modalities] == ["image"]
