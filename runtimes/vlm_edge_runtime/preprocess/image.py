"""Opening images: everything a caller may hand over becomes an upright, fully decoded `PIL.Image`, or one ImageError.

Orientation and colour follow transformers (`image_utils.load_image`, `image_transforms.convert_to_rgb`), with two differences
that are meant:

- Transparent pixels are always composited onto white. transformers does so for images that are passed as objects, but drops
  the alpha channel, uncovering whatever colour lies below, for the same file passed as a path.
- 16-bit grey keeps its high byte. Pillow's conversion, which transformers uses, clips at 255: nearly all of it white.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from vlm_edge_runtime.errors import ImageError

ImageLike: TypeAlias = (
    "Image.Image | npt.NDArray[np.uint8] | str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | ImageFile"
)
"""What `load_image` takes."""

_ORIENTATION_TAG = 0x0112
# What Pillow's decoders raise on damaged files, found by truncating and corrupting files of each format.
_DECODE_ERRORS = (OSError, SyntaxError, ArithmeticError, ValueError, TypeError, EOFError, LookupError, struct.error, zlib.error)


@dataclass(slots=True, frozen=True)
class ImageFile:
    """An image as it was stored, not decoded yet: the file's bytes, and what messages call it."""

    content: bytes
    name: str


def load_image(source: ImageLike) -> Image.Image:
    """An upright, decoded image in its own mode (`L`, `RGB`, `RGBA`, `P`, `CMYK` …); the first frame of an animation.

    `source`: a PIL image; a uint8 array `[height, width]` or `[height, width, 1 | 3 | 4]`; a path; encoded bytes; a binary
    file object; a `data:` URL; or what `read_image` returned. The EXIF orientation is applied. An upright, decoded PIL image is
    returned as it is.

    Raises ImageError for anything else: a missing file, a file that is no image, is truncated, or holds more pixels than
    `PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb).
    """
    found = read_image(source)
    return _from_bytes(found.content, found.name) if isinstance(found, ImageFile) else found


def read_image(source: ImageLike) -> Image.Image | ImageFile:
    """What `load_image` begins with: the bytes of what is stored somewhere, before they are decoded; else a decoded image.

    Raises ImageError for what cannot be read; whether bytes are those of an image is seen when they are decoded.
    """
    if isinstance(source, ImageFile):
        return source
    if isinstance(source, Image.Image):
        return _decode(source, "the PIL image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, str):
        if source.startswith("data:"):
            return ImageFile(_data_url_bytes(source), "the data: URL")
        if source.startswith(("http://", "https://")):
            raise ImageError(f"{source} is a web address, and nothing is downloaded here; fetch it and pass a path or its bytes")
    if isinstance(source, (str, os.PathLike)):
        return _from_path(Path(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return ImageFile(bytes(source), f"the {len(source)} bytes")
    if hasattr(source, "read"):
        content = source.read()
        if not isinstance(content, bytes):
            raise ImageError(f"the file object gave {type(content).__name__}, not bytes; open it in binary mode ('rb')")
        return ImageFile(content, f"the file object {getattr(source, 'name', '')!r}")
    raise ImageError(
        f"{type(source).__name__} is not an image; expected a PIL image, a uint8 array [height, width, channels], a path, "
        "encoded bytes, a binary file object or a data: URL"
    )


def to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 `[height, width, 3]`; transparency (alpha channel, palette or colour key) is composited onto white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.asarray(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, rgba)
        return np.asarray(image.convert("RGB"))
    except ValueError as error:
        raise ImageError(f"an image of mode {image.mode!r} cannot be converted to RGB: {error}") from error


def to_channels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 `[height, width, channels]` with the image's own channels, for processors that do not convert to RGB."""
    if image.mode not in ("L", "RGB", "RGBA", "CMYK"):
        raise ImageError(
            f"the image has mode {image.mode!r} and the processor's do_convert_rgb is false; convert it to L or RGB first"
        )
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def content_hash(image: Image.Image | ImageFile) -> str:
    """A digest of what is shown: the image half of a cache key.

    Of a file, its bytes (its orientation is among them); of a decoded image, mode, size, pixels, palette and transparency. The
    same picture as a file and as pixels has two digests. SHA-256, which CPUs have instructions for: 9.4 MB of pixels take 5.3 ms,
    BLAKE2b's 10.2 (Zen 4); a JPEG file of them 0.1 and no decoding.
    """
    if isinstance(image, ImageFile):
        return "file/" + hashlib.sha256(image.content).hexdigest()
    digest = hashlib.sha256(f"{image.mode} {image.size} {image.info.get('transparency')!r}".encode())
    if (palette := image.getpalette("RGBA")) is not None:
        digest.update(bytes(palette))
    digest.update(image.tobytes())
    return digest.hexdigest()


def _from_path(path: Path) -> ImageFile:
    try:
        return ImageFile(path.read_bytes(), str(path))
    except IsADirectoryError as error:
        raise ImageError(f"{path} is a folder, not an image file") from error
    except FileNotFoundError as error:
        raise ImageError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{str(path)[:200]} cannot be read: {error}") from error


def _from_bytes(content: bytes, name: str) -> Image.Image:
    if not content:
        raise ImageError(f"{name} is empty")
    try:
        image = Image.open(io.BytesIO(content))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: {error}") from error
    except _DECODE_ERRORS as error:
        start = content[:8]
        raise ImageError(
            f"{name} is not an image that can be decoded (it starts with {start!r}); expected PNG, JPEG, WebP, BMP, GIF, TIFF …"
        ) from error
    return _decode(image, name)


def _from_array(pixels: npt.NDArray[Any]) -> Image.Image:
    if pixels.dtype != np.uint8:
        raise ImageError(f"an image array must be uint8 with values 0-255; found {pixels.dtype}")
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)) or 0 in pixels.shape:
        raise ImageError(f"an image array must be [height, width] or [height, width, 1 | 3 | 4]; found {list(pixels.shape)}")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        # For arrays transformers rounds the composite itself; Pillow's alpha_composite may differ by one.
        alpha = pixels[..., 3:] / 255
        pixels = np.round(alpha * pixels[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    return _check_pixels(Image.fromarray(np.ascontiguousarray(pixels)), "the array")


def _data_url_bytes(url: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise ImageError(f"the data: URL {header[:60]!r} has no comma before its content")
    if not header.endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error:
        pass
    try:
        # Line breaks and percent escapes are legal in a URL's base64.
        return base64.b64decode(b"".join(unquote_to_bytes(payload).split()), validate=True)
    except binascii.Error as error:
        raise ImageError(f"the data: URL's base64 is damaged: {error}") from error


def _check_pixels(image: Image.Image, name: str) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    width, height = image.size
    if limit is not None and width * height > limit:
        raise ImageError(
            f"{name} has {width} × {height} = {width * height} pixels, more than the {limit} that are decoded (it could be a "
            "decompression bomb); shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS"
        )
    return image


def _decode(image: Image.Image, name: str) -> Image.Image:
    _check_pixels(image, name)
    if 0 in image.size:
        raise ImageError(f"{name} has no pixels ({image.width} × {image.height})")
    try:
        image.load()
        if image.getexif().get(_ORIENTATION_TAG, 1) != 1:
            return ImageOps.exif_transpose(image)
    except _DECODE_ERRORS as error:
        kind = f"{image.format or image.mode} image of {image.width} × {image.height}"
        raise ImageError(f"{name} is a {kind} that is truncated or damaged: {error}") from error
    return image


def _to_8_bit(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("the image has floating-point pixels of unknown range; scale it to 8 bits (0-255) before passing it")
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise ImageError(f"the image has integer pixels from {low} to {high}; expected 8 or 16 bits (0-65535)")
    # Mode "I" carries 8-bit data too (some TIFFs, PGM); "I;16" always means 16 bits.
    shift = 0 if image.mode == "I" and high <= 0xFF else 8
    return Image.fromarray((values >> shift).astype(np.uint8))
