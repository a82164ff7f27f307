"""Image arithmetic: integer for integer what Pillow computes, bit for bit what numpy computes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_edge_runtime import _native
from vlm_edge_runtime.errors import PromptError
from vlm_edge_runtime.preprocess import ops

FILTERS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
ORDER = "auto" if int(PIL.__version__.split(".")[0]) >= 13 else "horizontal"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _known(name: str) -> bool:
    image = np.zeros((1, 1, 1), np.uint8)
    try:
        _native.resize_u8(image, image.copy(), "box", kernels=name)  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


KERNELS = [name for name in ("scalar", "avx2", "avx512", "neon") if _known(name)]


def _resize(image: np.ndarray, height: int, width: int, name: str, **how: object) -> np.ndarray:
    out = np.full((height, width, image.shape[2]), 7, np.uint8)
    _native.resize_u8(image, out, name, ORDER, **how)  # type: ignore[arg-type]
    return out


def _pillow(image: np.ndarray, height: int, width: int, name: str) -> np.ndarray:
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    return np.asarray(picture.resize((width, height), FILTERS[name])).reshape(height, width, image.shape[2])


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 90)] * 4),
    channels=st.sampled_from([1, 3]),
    name=st.sampled_from(sorted(FILTERS)),
    seed=st.integers(0, 1000),
    extremes=st.booleans(),
)
def test_resize_equals_pillow(sizes, channels, name, seed, extremes) -> None:
    height, width, out_height, out_width = sizes
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
    if extremes:  # overshoot of the cubic and Lanczos kernels must be clipped the same way
        image = np.where(image < 128, 0, 255).astype(np.uint8)
    expected = _pillow(image, out_height, out_width, name)
    for kernels in KERNELS:
        np.testing.assert_array_equal(_resize(image, out_height, out_width, name, kernels=kernels), expected, kernels)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", sorted(FILTERS))
@pytest.mark.parametrize(
    "sizes",
    [(480, 640, 224, 224), (300, 451, 512, 512), (1, 900, 7, 30), (700, 1, 512, 512), (333, 512, 333, 200), (512, 200, 64, 200)],
)
def test_resize_equals_pillow_at_camera_sizes(name, sizes, kernels) -> None:
    height, width, out_height, out_width = sizes
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = _resize(image, out_height, out_width, name, kernels=kernels, threads=3)
    np.testing.assert_array_equal(found, _pillow(image, out_height, out_width, name))


@pytest.mark.parametrize("order", ["horizontal", "vertical"])
def test_every_number_of_threads_gives_the_same(order) -> None:
    image = np.random.default_rng(2).integers(0, 256, (701, 533, 3), dtype=np.uint8)
    results = []
    for threads in (1, 2, 3, 4, 5, 8, 1000):
        out = np.empty((400, 391, 3), np.uint8)
        _native.resize_u8(image, out, "lanczos", order, threads)
        results.append(out)
    for one in results[1:]:
        np.testing.assert_array_equal(one, results[0])


def test_several_callers_at_once() -> None:
    """One of them has the threads; the others work alone, on weights that all of them share."""
    image = np.random.default_rng(3).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    sizes = [(224, 298 + number % 5) for number in range(60)]  # more sizes than the library has callers: some weights are shared
    expected = {size: _pillow(image, *size, "bicubic") for size in set(sizes)}
    with ThreadPoolExecutor(6) as callers:
        found = callers.map(lambda size: _resize(image, *size, "bicubic", threads=2), sizes)
        for size, one in zip(sizes, found, strict=True):
            np.testing.assert_array_equal(one, expected[size])


def test_more_sizes_than_are_remembered() -> None:
    image = np.random.default_rng(4).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    for _ in range(2):
        for side in range(1, 40):
            np.testing.assert_array_equal(_resize(image, side, 41 - side, "hamming"), _pillow(image, side, 41 - side, "hamming"))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_part_of_an_image_is_read_where_it_lies(kernels, channels) -> None:
    whole = np.random.default_rng(5).integers(0, 256, (90, 120, channels), dtype=np.uint8)
    for top, left, height, width in [
        (0, 0, 1, 1),
        (3, 7, 50, 41),
        (40, 79, 50, 41),
        (89, 0, 1, 120),
        (0, 119, 90, 1),
        (1, 1, 89, 119),
    ]:
        part = whole[top : top + height, left : left + width]
        for size in [(17, 23), (64, 5), (130, 131), (height, 9), (9, width)]:
            found = _resize(part, *size, "bicubic", kernels=kernels)
            np.testing.assert_array_equal(found, _pillow(np.ascontiguousarray(part), *size, "bicubic"))


def test_a_fork_goes_on_with_threads_of_its_own() -> None:
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    image = np.random.default_rng(6).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    expected = _resize(image, 300, 500, "bicubic", threads=2)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(_resize(image, 300, 500, "bicubic", threads=2), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_resize_to_the_same_size_is_a_copy() -> None:
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    np.testing.assert_array_equal(_resize(image, 4, 5, "lanczos"), image)


@pytest.mark.parametrize("scale", [1 / 255, 1.0, 0.00392156862745098, 2 / 255])
def test_normalize_is_bit_equal_to_transformers(scale) -> None:
    transforms = pytest.importorskip("transformers.image_transforms")
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    planes = image.transpose(2, 0, 1)
    rescaled = transforms.rescale(planes, scale, input_data_format="channels_first")
    expected = transforms.normalize(rescaled, MEAN, STD, input_data_format="channels_first")
    out = np.empty((3, 37, 53), np.float32)
    _native.normalize_u8([image], scale, MEAN, STD, out)
    np.testing.assert_array_equal(out.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_normalize_any_channel_count(channels) -> None:
    image = np.arange(256 * channels, dtype=np.uint32).astype(np.uint8).reshape(16, 16, channels)
    mean, std = MEAN[:1] * channels, STD[:1] * channels
    out = np.empty((channels, 16, 16), np.float32)
    _native.normalize_u8([image], 1 / 255, mean, std, out)
    rescaled = (image.astype(np.float64) / 255).astype(np.float32).transpose(2, 0, 1)
    np.testing.assert_allclose(out, (rescaled - np.float32(mean[0])) / np.float32(std[0]), rtol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("frames", "patch", "merge", "depth"), [(1, 0, 1, 1), (5, 0, 1, 1), (1, 14, 2, 2), (5, 7, 2, 2), (4, 28, 1, 3)]
)
def test_tiles_are_cut_and_laid_out_on_the_way(threads, frames, patch, merge, depth) -> None:
    whole = np.random.default_rng(0).integers(0, 256, (2 * 168, 3 * 224, 3), dtype=np.uint8)
    tiles = [whole[y : y + 168, x : x + 224] for y in (0, 168) for x in (0, 224, 448)][:frames]
    planes = np.stack([ops.normalize([np.ascontiguousarray(tile)], 1 / 255, MEAN, STD)[0] for tile in tiles])
    expected = ops.cut(planes, ops.Patches(patch, merge, depth)) if patch else planes
    out = np.full(expected.shape, np.nan, np.float32)
    _native.normalize_u8(tiles, 1 / 255, MEAN, STD, out, patch, merge, depth, threads)
    np.testing.assert_array_equal(out, expected)


def test_bad_arguments_are_refused() -> None:
    image, out = np.zeros((4, 4, 3), np.uint8), np.zeros((3, 4, 4), np.float32)
    with pytest.raises(ValueError, match="48 elements, the frames become 96"):
        _native.normalize_u8([image, image], 1.0, MEAN, STD, out)
    with pytest.raises(ValueError, match="2 values, the image has 3"):
        _native.normalize_u8([image], 1.0, MEAN[:2], STD, out)
    with pytest.raises(ValueError, match="std of channel 1 is 0"):
        _native.normalize_u8([image], 1.0, MEAN, (1, 0, 1), out)
    with pytest.raises(TypeError, match="writable"):
        _native.normalize_u8([image], 1.0, MEAN, STD, out.tobytes())
    with pytest.raises(ValueError, match="there are no frames"):
        _native.normalize_u8([], 1.0, MEAN, STD, out)
    with pytest.raises(ValueError, match="frame 1 is 2 x 4 x 3, the first one 4 x 4 x 3"):
        _native.normalize_u8([image, image[:2]], 1.0, MEAN, STD, out)
    for patch, merge, depth in [(3, 1, 1), (2, 3, 1), (-1, 1, 1), (2, 0, 1), (2, 1, 0), (2**40, 2**40, 1)]:
        with pytest.raises(ValueError, match="cannot be cut"):
            _native.normalize_u8([image], 1.0, MEAN, STD, out, patch, merge, depth)
    small = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(TypeError, match="float32, expected uint8"):
        _native.resize_u8(out, small, "box")
    with pytest.raises(TypeError, match="gaps within its lines"):
        _native.resize_u8(image[:, ::2], small, "box")
    with pytest.raises(TypeError, match="gaps within its lines"):
        _native.resize_u8(image[::-1], small, "box")
    with pytest.raises(TypeError, match="gaps or another order"):
        _native.resize_u8(image, np.zeros((2, 4, 3), np.uint8)[:, :2], "box")
    with pytest.raises(TypeError, match="writable"):
        _native.resize_u8(image, np.frombuffer(bytes(12), np.uint8).reshape(2, 2, 3), "box")
    with pytest.raises(ValueError, match="unknown filter 'nearest'"):
        _native.resize_u8(image, small, "nearest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown order 'both'"):
        _native.resize_u8(image, small, "box", "both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no kernels called 'mmx'"):
        _native.resize_u8(image, small, "box", kernels="mmx")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 channels cannot be resized into one of 1"):
        _native.resize_u8(image, small[..., :1].copy(), "box")
    for shape in [(0, 4, 3), (4, 0, 3), (4, 4, 5)]:
        with pytest.raises(ValueError, match="sizes must be positive"):
            _native.resize_u8(np.zeros(shape, np.uint8), small, "box")
    with pytest.raises(ValueError, match="2 dimensions"):
        _native.resize_u8(image[..., 0].copy(), small, "box")


def test_merge_replaces_image_tokens_in_order() -> None:
    ids = np.array([5, 9, 9, 1, 9], np.int64)
    embeddings = np.zeros((5, 4), np.float32)
    features = np.arange(12, dtype=np.float32).reshape(3, 4) + 1
    assert _native.merge_features(embeddings, ids, 9, features) == 3
    np.testing.assert_array_equal(embeddings[[1, 2, 4]], features)
    np.testing.assert_array_equal(embeddings[[0, 3]], 0)
    assert _native.merge_features(embeddings, ids, 77, np.zeros((0, 4), np.float32)) == 0


def test_merge_refuses_other_counts_and_writes_nothing() -> None:
    ids = np.array([9, 9], np.int64)
    embeddings = np.zeros((2, 4), np.float32)
    with pytest.raises(PromptError, match=r"2 image tokens .* 3 feature rows"):
        _native.merge_features(embeddings, ids, 9, np.ones((3, 4), np.float32))
    assert not embeddings.any()
    with pytest.raises(ValueError, match="features are 3 wide, embeddings 4"):
        _native.merge_features(embeddings, ids, 9, np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match="2 rows for 1 input_ids"):
        _native.merge_features(embeddings, ids[:1], 9, np.ones((1, 4), np.float32))
