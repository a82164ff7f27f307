"""How each kind of input is opened and preprocessed. Images and videos have processors; vectors are taken as they are."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageSequence

from vlm_edge_runtime.bundle.manifest import TensorSpec
from vlm_edge_runtime.errors import CapabilityError, ImageError, PromptError
from vlm_edge_runtime.preprocess import EncodedImage, ImageFile, ImageProcessor, content_hash, load_image, read_image
from vlm_edge_runtime.preprocess.video import VideoProcessor

from .media import digest


class ImageReader:
    """Images, by the bundle's image processor."""

    kind = "image"

    def __init__(self, processor: ImageProcessor) -> None:
        self.fingerprint = processor.fingerprint
        self._processor = processor

    def open(self, source: Any) -> tuple[Image.Image | ImageFile, str]:
        """An image and a hash of it: a file's bytes, which are decoded when they are processed, or pixels. Raises ImageError."""
        image = read_image(source)
        return image, content_hash(image)

    def process(self, opened: Any) -> EncodedImage:
        """The vision encoder's inputs. Raises ImageError, for bytes that are no image too."""
        return self._processor(opened)


class VideoReader:
    """Videos: sequences of frames, by the bundle's video processor."""

    kind = "video"

    def __init__(self, processor: VideoProcessor | None) -> None:
        self.fingerprint = processor.fingerprint if processor is not None else ""
        self._processor = processor

    def open(self, source: Any) -> tuple[ImageFile | tuple[list[Image.Image], float | None], str]:
        """A file's bytes, or decoded frames with their rate; and a hash. Raises ImageError, CapabilityError without processor."""
        if self._processor is None:
            raise CapabilityError(
                "this bundle takes videos, but has no video processor that this version knows: pass single frames as images."
            )
        stored = isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview))
        if stored and isinstance(file := read_image(source), ImageFile):
            return file, content_hash(file)
        frames, fps = open_video(source)
        return (frames, fps), digest("/".join([repr(fps), *map(content_hash, frames)]).encode())

    def process(self, opened: Any) -> EncodedImage:
        """The vision encoder's inputs. Raises ImageError."""
        assert self._processor is not None  # `open` refuses
        frames, fps = open_video(opened) if isinstance(opened, ImageFile) else opened
        return self._processor(frames, fps)


class VectorReader:
    """Audio features float32 `[T, D]` and states float32 `[D]`: the numbers themselves, as the first graph takes them.

    `spec`: that graph's input; its first dimension is the batch.
    """

    def __init__(self, kind: str, spec: TensorSpec) -> None:
        self.kind = kind
        self.fingerprint = spec.name
        self._spec = spec

    def open(self, source: Any) -> tuple[npt.NDArray[np.float32], str]:
        """The numbers and a hash of them. Raises PromptError for what is no array of the right shape."""
        expected = self._spec.shape[1:]
        article = "an" if self.kind == "audio" else "a"
        wanted = f"{article} {self.kind} input must be numbers of shape [{', '.join(map(str, expected))}]"
        try:
            values = np.ascontiguousarray(source, dtype=np.float32)
        except (TypeError, ValueError):
            raise PromptError(f"{wanted}; found {type(source).__name__}.") from None
        fits = values.ndim == len(expected) and all(
            size > 0 and (isinstance(name, str) or size == name) for size, name in zip(values.shape, expected, strict=True)
        )
        if not fits or not np.isfinite(values).all():
            found = list(values.shape) if not fits else "values that are not finite"
            raise PromptError(f"{wanted}; found {found}.")
        return values, digest(repr(values.shape).encode() + values.tobytes())

    def process(self, opened: Any) -> EncodedImage:
        """The array with a batch of one."""
        return EncodedImage({self._spec.name: opened[None]}, (0, 0))


def open_video(source: Any) -> tuple[list[Image.Image], float | None]:
    """The frames of a video in order, and how many a second, where that is known.

    `source`: a sequence of images; uint8 `[frames, height, width, 3]`; or an animated image (GIF, WebP, APNG) as a path, bytes or
    PIL image. Raises ImageError for anything else, no frames, or frames of different sizes.
    """
    fps: float | None = None
    if isinstance(source, (list, tuple)) or (isinstance(source, np.ndarray) and source.ndim == 4):
        frames = [load_image(frame) for frame in source]
    else:
        frames, fps = _animation(source)
    if not frames:
        raise ImageError("the video has no frames: pass at least one.")
    if len({frame.size for frame in frames}) > 1:
        raise ImageError("the frames of a video must have one size; resize them first.")
    return frames, fps


def is_one_video(value: Any) -> bool:
    """Whether a value is one video: not a list of videos, but a list of frames (images and arrays, not paths) counts as one."""
    if not isinstance(value, (list, tuple)):
        return not (isinstance(value, np.ndarray) and value.ndim == 5)
    return bool(value) and all(
        isinstance(each, Image.Image) or (isinstance(each, np.ndarray) and each.ndim in (2, 3)) for each in value
    )


def is_one_vector(rank: int) -> Callable[[Any], bool]:
    """Whether a value is one input of so many dimensions, and not a list of them."""

    def check(value: Any) -> bool:
        try:
            return np.ndim(value) <= rank
        except ValueError:  # lists of unlike lengths
            return False

    return check


def _animation(source: Any) -> tuple[list[Image.Image], float | None]:
    opened: Any = source if isinstance(source, Image.Image) else read_image(source)
    if isinstance(opened, ImageFile):
        source = opened
        try:
            opened = Image.open(io.BytesIO(source.content))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return [load_image(source)], None  # which says what is wrong
    if getattr(opened, "n_frames", 1) == 1:
        return [load_image(source)], None
    frames, milliseconds = [], 0.0
    try:
        for frame in ImageSequence.Iterator(opened):
            milliseconds += float(frame.info.get("duration", 0) or 0)
            frames.append(frame.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"frame {len(frames) + 1} of the video cannot be decoded: {error}") from error
    return frames, 1000 * len(frames) / milliseconds if milliseconds > 0 else None
