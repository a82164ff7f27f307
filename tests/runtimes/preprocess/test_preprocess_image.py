"""What `load_image` takes, what it makes of odd modes and orientations, and what it refuses."""

from __future__ import annotations

import base64
import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image as reference_load_image

from vlm_edge_runtime.errors import ImageError, VlmEdgeError
from vlm_edge_runtime.preprocess import content_hash, load_image, load_image_processor, read_image
from vlm_edge_runtime.preprocess.image import to_rgb

PROCESSOR = load_image_processor({"image_processor_type": "CLIPImageProcessor"})


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo(photographs: dict[str, Image.Image]) -> Image.Image:
    return photographs["chelsea.png"].resize((90, 60))


def test_every_kind_of_source_gives_the_same_pixels(photo: Image.Image, tmp_path: Path) -> None:
    content = encoded(photo, "PNG")
    path = tmp_path / "a cat.png"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    sources = [
        photo,
        np.asarray(photo),
        np.asarray(photo)[::-1][::-1],
        path,
        str(path),
        content,
        bytearray(content),
        memoryview(content),
        io.BytesIO(content),
        f"data:image/png;base64,{text}",
        "data:image/png;base64," + "%0A".join(text[i : i + 76] for i in range(0, len(text), 76)),
    ]
    with path.open("rb") as stream:
        sources.append(stream)
        for source in sources:
            np.testing.assert_array_equal(np.asarray(load_image(source).convert("RGB")), np.asarray(photo))


def test_grey_arrays(photo: Image.Image) -> None:
    grey = np.asarray(photo.convert("L"))
    for array in (grey, grey[..., None]):
        np.testing.assert_array_equal(np.asarray(load_image(array)), grey)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, photo: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "phone.jpg"
    path.write_bytes(encoded(photo, "JPEG", exif=exif, quality=95))
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(reference_load_image(str(path))))
    with Image.open(path) as opened:
        # Also for an opened image, where transformers' processors would leave it lying on its side.
        assert load_image(opened).size == ((60, 90) if orientation > 4 else (90, 60))
    assert PROCESSOR(path).size == ((90, 60) if orientation > 4 else (60, 90))


def test_sixteen_bits_keep_their_high_byte() -> None:
    values = np.linspace(0, 65535, 256 * 4, dtype=np.uint16).reshape(16, 64)
    path = encoded(Image.fromarray(values), "PNG")
    np.testing.assert_array_equal(to_rgb(load_image(path))[..., 1], (values >> 8).astype(np.uint8))
    eight_bits_in_integers = Image.fromarray((values >> 8).astype(np.int32))
    np.testing.assert_array_equal(to_rgb(load_image(eight_bits_in_integers))[..., 0], (values >> 8).astype(np.uint8))


def test_unknown_ranges_are_refused() -> None:
    with pytest.raises(ImageError, match="floating-point"):
        to_rgb(Image.fromarray(np.zeros((4, 4), np.float32)))
    with pytest.raises(ImageError, match="from 0 to 70000"):
        to_rgb(Image.fromarray(np.array([[0, 70000]], np.int32)))


def test_transparency_becomes_white() -> None:
    clear_red = Image.new("RGBA", (3, 3), (255, 0, 0, 0))
    assert to_rgb(load_image(encoded(clear_red, "PNG"))).min() == 255
    keyed = Image.new("RGB", (3, 3), (255, 0, 0))
    assert to_rgb(load_image(encoded(keyed, "PNG", transparency=(255, 0, 0)))).min() == 255


def test_first_frame_of_an_animation(photo: Image.Image) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert to_rgb(load_image(content))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (Path("/nonexistent/cat.png"), "does not exist"),
        (Path("/tmp"), "folder"),
        ("cat\0.png", "cannot be read"),
        ("https://example.org/cat.png", "web address"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,@@@@", "base64 is damaged"),
        ("data:text/plain,hello", "not an image"),
        (io.StringIO("text"), "binary mode"),
        (12, "int is not an image"),
        (None, "NoneType is not an image"),
        ([[1, 2]], "list is not an image"),
        (np.zeros((4, 4, 3), np.float32), "must be uint8.*float32"),
        (np.zeros((3, 8, 8), np.uint8), "height, width"),
        (np.zeros((4, 4, 2), np.uint8), "height, width"),
        (np.zeros((0, 4, 3), np.uint8), "height, width"),
        (np.zeros((2, 4, 4, 3), np.uint8), "height, width"),
        (Image.new("RGB", (0, 5)), "no pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_refused(source: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files(kind: str, photo: Image.Image) -> None:
    content = encoded(photo, kind)
    with pytest.raises(ImageError, match=r"truncated or damaged|not an image"):
        load_image(content[: len(content) * 2 // 3])


def test_decompression_bombs(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.new("1", (2000, 2000)), "PNG")
    assert load_image(content).size == (2000, 2000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(ImageError, match="exceeds limit"):
        load_image(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3_000_000)
    # Here Pillow itself would only warn.
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ImageError, match="could be a decompression bomb"):
        load_image(content)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on damaged TIFF tags
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO"]))
def test_damaged_files_end_in_an_image_or_an_image_error(data: st.DataObject, kind: str) -> None:
    content = bytearray(encoded(Image.effect_mandelbrot((24, 20), (-2, -1, 1, 1), 20).convert("L"), kind))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)):
        content[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(VlmEdgeError):
        to_rgb(load_image(bytes(content[: data.draw(st.integers(0, len(content)))])))


def test_content_hash_sees_palette_and_pixels(photo: Image.Image) -> None:
    palette = photo.quantize(8)
    other = palette.copy()
    other.putpalette([255 - value for value in palette.getpalette() or []])
    images = [photo, photo.rotate(180), photo.convert("L"), photo.resize((60, 90)), palette, other]
    assert len({content_hash(image) for image in images}) == len(images)
    assert content_hash(photo) == content_hash(photo.copy())


def test_a_file_is_known_by_its_bytes(photo: Image.Image, tmp_path: Path) -> None:
    """However it is passed, and with its orientation; a picture that is held in memory is known by its pixels."""
    content, exif = encoded(photo, "PNG"), Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    photo.save(turned, "PNG", exif=exif)
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    same = [path, str(path), content, bytearray(content), memoryview(content), io.BytesIO(content), url]
    known = {content_hash(read_image(source)) for source in same}
    assert len(known) == 1
    assert content_hash(read_image(turned.getvalue())) not in known
    assert content_hash(read_image(photo)) not in known
    assert load_image(read_image(turned.getvalue())).size == photo.size[::-1]
    path.write_bytes(turned.getvalue())
    assert content_hash(read_image(path)) not in known, "what lies there now, not what it is called"
