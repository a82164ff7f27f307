"""Image arithmetic: integer for integer what Pillow computes, bit for bit what numpy computes."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_edge_runtime import _native
from vlm_edge_runtime.errors import PromptError

FILTERS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
ORDER = "auto" if int(PIL.__version__.split(".")[0]) >= 13 else "horizontal"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _resize(image: np.ndarray, height: int, width: int, name: str) -> np.ndarray:
    h, w, c = image.shape
    return np.frombuffer(_native.resize_u8(image, h, w, c, height, width, name, ORDER), np.uint8).reshape(height, width, c)


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
    np.testing.assert_array_equal(_resize(image, out_height, out_width, name), _pillow(image, out_height, out_width, name))


@pytest.mark.parametrize("name", sorted(FILTERS))
@pytest.mark.parametrize(
    "sizes",
    [(480, 640, 224, 224), (300, 451, 512, 512), (1, 900, 7, 30), (700, 1, 512, 512), (333, 512, 333, 200), (512, 200, 64, 200)],
)
def test_resize_equals_pillow_at_camera_sizes(name, sizes) -> None:
    height, width, out_height, out_width = sizes
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    np.testing.assert_array_equal(_resize(image, out_height, out_width, name), _pillow(image, out_height, out_width, name))


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
    _native.normalize_hwc_u8(image, 37, 53, 3, scale, MEAN, STD, out)
    np.testing.assert_array_equal(out.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_normalize_any_channel_count(channels) -> None:
    image = np.arange(256 * channels, dtype=np.uint32).astype(np.uint8).reshape(16, 16, channels)
    mean, std = MEAN[:1] * channels, STD[:1] * channels
    out = np.empty((channels, 16, 16), np.float32)
    _native.normalize_hwc_u8(image, 16, 16, channels, 1 / 255, mean, std, out)
    rescaled = (image.astype(np.float64) / 255).astype(np.float32).transpose(2, 0, 1)
    np.testing.assert_allclose(out, (rescaled - np.float32(mean[0])) / np.float32(std[0]), rtol=1e-6)


def test_bad_arguments_are_refused() -> None:
    image, out = np.zeros((4, 4, 3), np.uint8), np.zeros((3, 4, 4), np.float32)
    with pytest.raises(ValueError, match="48 elements"):
        _native.normalize_hwc_u8(image, 5, 4, 3, 1.0, MEAN, STD, out)
    with pytest.raises(ValueError, match="2 values, the image has 3"):
        _native.normalize_hwc_u8(image, 4, 4, 3, 1.0, MEAN[:2], STD, out)
    with pytest.raises(ValueError, match="std of channel 1 is 0"):
        _native.normalize_hwc_u8(image, 4, 4, 3, 1.0, MEAN, (1, 0, 1), out)
    with pytest.raises(TypeError, match="writable"):
        _native.normalize_hwc_u8(image, 4, 4, 3, 1.0, MEAN, STD, out.tobytes())
    with pytest.raises(TypeError, match="float32, expected uint8"):
        _native.resize_u8(out, 4, 4, 3, 2, 2, "box")
    with pytest.raises(TypeError, match="C-contiguous"):
        _native.resize_u8(image[:, ::2], 4, 2, 3, 2, 2, "box")
    with pytest.raises(ValueError, match="unknown filter 'nearest'"):
        _native.resize_u8(image, 4, 4, 3, 2, 2, "nearest")  # type: ignore[arg-type]
    for size in (0, -1, 2**40):
        with pytest.raises(ValueError, match="sizes must be positive"):
            _native.resize_u8(image, 4, 4, 3, size, 2, "box")


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
