"""Position ids against Qwen2-VL's own `get_rope_index`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from vlm_edge_runtime.bundle.manifest import MRopePositions, SequentialPositions
from vlm_edge_runtime.errors import PromptError
from vlm_edge_runtime.preprocess import EncodedImage
from vlm_edge_runtime.text import position_ids

IMAGE, START, END = 7, 8, 9


def image(*grid: int) -> EncodedImage:
    return EncodedImage({}, (10, 10), grid=(grid[0], grid[1], grid[2]))


def reference(ids: list[int], grids: list[tuple[int, int, int]], merge: int) -> tuple[np.ndarray, int]:
    """Only what `get_rope_index` reads of the model: its configuration."""

    class Model:
        config = Qwen2VLConfig(vision_config={"spatial_merge_size": merge})
        get_vision_position_ids = Qwen2VLModel.get_vision_position_ids

    tokens = torch.tensor([ids])
    types = (tokens == IMAGE).int()
    model: Any = Model()
    positions, delta = Qwen2VLModel.get_rope_index(model, tokens, types, torch.tensor(grids) if grids else None)
    return positions[:, 0].numpy(), len(ids) + int(delta[0, 0])


@settings(max_examples=60, deadline=None)
@given(
    merge=st.integers(1, 3),
    pieces=st.lists(st.integers(0, 6) | st.tuples(st.just(1), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=7),
)
def test_layouts_of_text_and_images(merge: int, pieces: list[Any]) -> None:
    ids, grids = [1], []
    for piece in pieces:
        if isinstance(piece, int):
            ids += [2] * piece
        else:
            time, height, width = piece
            grids.append((time, height * merge, width * merge))
            ids += [START, *[IMAGE] * (time * height * width), END]
    contract = MRopePositions(merge_size=merge, image_token_id=IMAGE, vision_start_token_id=START)
    positions, following = position_ids(contract, ids, [image(*grid) for grid in grids])
    expected, expected_following = reference(ids, grids, merge)
    np.testing.assert_array_equal(positions, expected)
    assert positions.dtype == np.int64
    assert following == expected_following


def test_an_image_may_come_last_or_follow_another_directly() -> None:
    contract = MRopePositions(merge_size=1, image_token_id=IMAGE, vision_start_token_id=START)
    positions, following = position_ids(contract, [IMAGE] * 4 + [IMAGE] * 3, [image(1, 2, 2), image(1, 1, 3)])
    assert positions.tolist() == [[0, 0, 0, 0, 2, 2, 2], [0, 0, 1, 1, 2, 2, 2], [0, 1, 0, 1, 2, 3, 4]]
    assert following == 5


def test_sequential() -> None:
    positions, following = position_ids(SequentialPositions(), np.array([5, 6, 7]))
    assert positions.tolist() == [0, 1, 2] and following == 3
    empty, following = position_ids(MRopePositions(merge_size=2, image_token_id=IMAGE, vision_start_token_id=START), [])
    assert empty.shape == (3, 0) and following == 0


@pytest.mark.parametrize(
    ("ids", "images", "message"),
    [
        ([1, IMAGE, IMAGE], [], "2 image tokens and its 0 images need 0"),
        ([1, IMAGE, IMAGE], [image(1, 2, 4)], "2 image tokens and its 1 images need 8"),
        ([1, IMAGE, 2, IMAGE], [image(1, 1, 2)], "2 tokens is interrupted by other tokens after 1"),
        ([IMAGE], [EncodedImage({}, (1, 1))], "no grid"),
    ],
)
def test_refused(ids: list[int], images: list[EncodedImage], message: str) -> None:
    contract = MRopePositions(merge_size=1, image_token_id=IMAGE, vision_start_token_id=START)
    with pytest.raises(PromptError, match=message):
        position_ids(contract, ids, images)


def test_videos_by_their_places() -> None:
    """A video has another token than images; one whose frames stand apart is placed frame by frame."""
    contract = MRopePositions(merge_size=1, image_token_id=IMAGE, vision_start_token_id=START)
    video = 10
    ids = [1, *[video] * 8, 2, *[IMAGE] * 4, 2]
    at = [np.arange(1, 9), np.arange(10, 14)]
    positions, following = position_ids(contract, ids, [image(2, 2, 2), image(1, 2, 2)], at)
    as_images = [IMAGE if token == video else token for token in ids]
    expected, expected_following = position_ids(contract, as_images, [image(2, 2, 2), image(1, 2, 2)])
    np.testing.assert_array_equal(positions, expected)
    assert following == expected_following
    apart = [1, *[video] * 4, 2, *[video] * 4, 2]
    positions, following = position_ids(contract, apart, [image(2, 2, 2)], [np.array([1, 2, 3, 4, 6, 7, 8, 9])])
    expected, expected_following = position_ids(
        contract, [IMAGE if token == video else token for token in apart], [image(1, 2, 2), image(1, 2, 2)]
    )
    np.testing.assert_array_equal(positions, expected)
    assert following == expected_following
    with pytest.raises(PromptError, match="interrupted"):
        position_ids(contract, apart, [image(2, 2, 2)], [np.array([1, 2, 3, 6, 7, 8, 9, 10])])
    with pytest.raises(PromptError, match="7 tokens in the prompt and needs 8"):
        position_ids(contract, apart, [image(2, 2, 2)], [np.arange(7)])
