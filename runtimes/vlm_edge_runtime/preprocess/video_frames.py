"""Videos as frames or as patches of several frames: LLaVA-OneVision, InternVL, Qwen2-VL, Qwen2.5-VL, Qwen3-VL.

transformers' classes resize in torchvision, here it is Pillow: levels of a frame may differ by one. The choice of frames, the
sizes and the order of patches are theirs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from vlm_edge_runtime.errors import ImageError, UnsupportedModelError

from .base import EncodedImage, FixedSizeProcessor
from .geometry import smart_resize
from .image import load_image, to_rgb
from .ops import Pixels, resize
from .options import CLIP_MEAN, CLIP_STD, HALF, Config
from .qwen2_vl import Qwen2VLImageProcessor, vision_position_ids

_SAMPLING = ("do_sample_frames", "num_frames", "fps")
_INERT = frozenset({"video_processor_type", "return_metadata", "video_metadata", "max_image_size", "max_duration"})
_DEFAULT_FPS = 24.0
"""What transformers takes a video to have where nothing says."""


class _Frames(FixedSizeProcessor):
    """Frames as images of one size; the defaults of transformers' video processors."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "do_resize": True,
        "size": {"height": 384, "width": 384},
        "resample": 3,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }


class FrameProcessor:
    """LlavaOnevisionVideoProcessor: `pixel_values [frames, C, H, W]`; `rows` of the result is one less than the frames."""

    name = "LlavaOnevisionVideoProcessor"

    def __init__(self, config: Config) -> None:
        self.sampling = _Sampling(self.name, config)
        self._images = _Frames(
            self.name, {key: value for key, value in config.items() if key not in (*_SAMPLING, *_INERT, *self.own)}
        )
        self.own_values = {key: config.get(key, default) for key, default in self.own.items()}
        self.fingerprint = _fingerprint(self.name, self._images.fingerprint, config)

    own: ClassVar[Mapping[str, Any]] = {}

    def chosen(self, total: int, fps: float | None) -> list[int]:
        """Which of `total` frames are taken, as transformers' `default_sample_indices_fn`. Raises ImageError."""
        wanted = self.sampling.wanted(total, fps)
        if wanted is None:
            return list(range(total))
        return [int(index) for index in np.arange(wanted, dtype=np.int64) * total // wanted]

    def __call__(self, frames: Sequence[Image.Image], fps: float | None = None) -> EncodedImage:
        indices = self.chosen(len(frames), fps) if self.sampling.on else list(range(len(frames)))
        encoded = [self._images(frames[index]) for index in indices]
        pixels = np.concatenate([one.arrays["pixel_values"] for one in encoded])
        return EncodedImage({"pixel_values": pixels}, encoded[0].size, rows=len(encoded) - 1, columns=1)


class InternVLVideoProcessor(FrameProcessor):
    """Frames from the middle of equal stretches, or from `initial_shift` on."""

    name = "InternVLVideoProcessor"
    own: ClassVar[Mapping[str, Any]] = {"initial_shift": True}

    def chosen(self, total: int, fps: float | None) -> list[int]:
        wanted = self.sampling.wanted(total, fps, least=0)
        if not wanted:
            raise ImageError(f"{self.name} samples frames, but num_frames and fps are both missing: set one of them")
        shift = self.own_values["initial_shift"]
        first = total / wanted / 2 if shift is True else float(shift or 0)
        return arange(first, total, total / wanted)


class _Qwen2Images(Qwen2VLImageProcessor):
    defaults: ClassVar[Mapping[str, Any]] = {
        **Qwen2VLImageProcessor.defaults,
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
    }


class _Qwen3Images(Qwen2VLImageProcessor):
    defaults: ClassVar[Mapping[str, Any]] = {
        **Qwen2VLImageProcessor.defaults,
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
        "image_mean": HALF,
        "image_std": HALF,
        "patch_size": 16,
    }


class Qwen2VLVideoProcessor:
    """`pixel_values [steps · patches, C · t · p · p]` and `position_ids`, one time step after another."""

    name = "Qwen2VLVideoProcessor"
    images: ClassVar[type[Qwen2VLImageProcessor]] = _Qwen2Images
    own: ClassVar[Mapping[str, Any]] = {
        "min_frames": 4,
        "max_frames": 768,
        "do_sample_frames": False,
        "cap_pixels_per_frame": None,
        "max_video_tokens": 128000,
        "fps": None,
    }

    def __init__(self, config: Config) -> None:
        self._own = {key: config.get(key, default) for key, default in self.own.items()}
        self.sampling = _Sampling(self.name, {**config, **{key: self._own[key] for key in ("do_sample_frames", "fps")}})
        rest = {key: value for key, value in config.items() if key not in (*_SAMPLING, *_INERT, *self.own)}
        self._images = self.images(self.name, rest)
        bounds = self._images.options.size
        self._smallest, self._largest = bounds.shortest_edge or 1, bounds.longest_edge or 1
        self.fingerprint = _fingerprint(self.name, self._images.fingerprint, config)

    def chosen(self, total: int, fps: float | None) -> list[int]:
        """Which of `total` frames are taken: a multiple of a time step's. Raises ImageError."""
        depth, asked = self._images.temporal_patch, self.sampling
        if asked.num_frames is not None:
            wanted = round(asked.num_frames / depth) * depth
        elif asked.fps is not None:
            most = math.floor(min(self._own["max_frames"], total) / depth) * depth
            rate = total / asked.rate(fps) * asked.fps
            wanted = math.floor(min(max(rate, self._own["min_frames"]), most, total) / depth) * depth
        else:
            return list(range(total))
        asked.check(wanted, total)
        return arange(0, total, total / wanted)

    def target(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """The size that each frame is resized to."""
        factor = self._images.patch * self._images.merge
        most = self._largest
        if self._own["cap_pixels_per_frame"]:
            total = int(self._own["max_video_tokens"] * factor * factor * 0.9)
            most = max(min(most, total * self._images.temporal_patch // frames), int(self._smallest * 1.05))
        return smart_resize(height, width, factor, self._smallest, most)

    def __call__(self, frames: Sequence[Image.Image], fps: float | None = None) -> EncodedImage:
        indices = self.chosen(len(frames), fps) if self.sampling.on else list(range(len(frames)))
        loaded = [load_image(frames[index]) for index in indices]
        size = (loaded[0].height, loaded[0].width)
        images = self._images
        target = self.target(len(loaded), *size) if images.options.do_resize else size
        factor = images.patch * images.merge
        if target[0] % factor or target[1] % factor:
            raise ImageError(f"frames of {size[1]} × {size[0]} and do_resize is false; both sides must be multiples of {factor}")
        pixels: list[Pixels] = [resize(to_rgb(frame), target, images.options.resample) for frame in loaded]
        rows, columns = target[0] // images.patch, target[1] // images.patch
        depth = images.temporal_patch
        steps = -(-len(indices) // depth)
        places = np.concatenate([vision_position_ids(rows, columns, images.merge)] * steps)
        rate = fps or _DEFAULT_FPS
        padded = [*indices, *[indices[-1]] * (-len(indices) % depth)]
        # transformers averages the first and the last frame of each time step.
        times = tuple((padded[i] / rate + padded[i + depth - 1] / rate) / 2 for i in range(0, len(padded), depth))
        sampled = len(indices) / len(frames) * fps if fps else _DEFAULT_FPS
        return EncodedImage(
            {"pixel_values": images.normalize(*pixels, patches=images.patches), "position_ids": places},
            size,
            grid=(steps, rows, columns),
            tokens=steps * rows * columns // images.merge**2,
            timestamps=times,
            seconds_per_step=depth / sampled,
        )


class Qwen3VLVideoProcessor(Qwen2VLVideoProcessor):
    """As Qwen2-VL's, with frames chosen at even distances, ends included, and bounds on the pixels of the whole video."""

    name = "Qwen3VLVideoProcessor"
    images: ClassVar[type[Qwen2VLImageProcessor]] = _Qwen3Images
    own: ClassVar[Mapping[str, Any]] = {**Qwen2VLVideoProcessor.own, "do_sample_frames": True, "max_video_tokens": 768, "fps": 2}
    """`fps` counts only where `num_frames` is not given."""

    def chosen(self, total: int, fps: float | None) -> list[int]:
        asked, least, most = self.sampling, self._own["min_frames"], self._own["max_frames"]
        wanted = asked.num_frames
        if wanted is None and asked.fps is not None:
            wanted = min(max(int(total / (fps or _DEFAULT_FPS) * asked.fps), least), most, total)
        if wanted is None:
            wanted = min(max(total, least), most)
        return [int(index) for index in np.linspace(0, total - 1, wanted).round()]

    def target(self, frames: int, height: int, width: int) -> tuple[int, int]:
        factor, depth = self._images.patch * self._images.merge, self._images.temporal_patch
        most = self._largest
        if self._own["cap_pixels_per_frame"]:
            share = min(self._own["max_video_tokens"] * factor * factor, most // frames)
            most = max(share, int(self._smallest * 1.05)) * frames
        if frames < depth:
            raise ImageError(f"a video of {frames} frames is shorter than one time step, which has {depth}; pass it as an image")
        return video_resize(frames, height, width, depth, factor, self._smallest, most)


def video_resize(frames: int, height: int, width: int, depth: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Qwen3-VL: as `smart_resize`, but the bounds are for the pixels of all frames together."""
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    together = round(frames / depth) * depth
    if together * tall * wide > most:
        beta = math.sqrt(frames * height * width / most)
        return max(factor, math.floor(height / beta / factor) * factor), max(factor, math.floor(width / beta / factor) * factor)
    if together * tall * wide < least:
        beta = math.sqrt(least / (frames * height * width))
        return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return tall, wide


class _Sampling:
    """`do_sample_frames`, `num_frames` and `fps` of a video processor. Raises UnsupportedModelError for both numbers."""

    def __init__(self, name: str, config: Config) -> None:
        self.name = name
        self.on = bool(config.get("do_sample_frames"))
        self.num_frames: int | None = config.get("num_frames")
        self.fps: float | None = config.get("fps") if self.num_frames is None else None
        if (
            self.on
            and self.num_frames is not None
            and config.get("num_frames")
            and config.get("fps")
            and name.startswith("Qwen2")
        ):
            raise UnsupportedModelError(
                f"{name} has num_frames={self.num_frames} and fps={config['fps']}: set one of them to null"
            )

    def rate(self, fps: float | None) -> float:
        """Frames a second of the video. Raises ImageError where nothing says."""
        if fps is None:
            raise ImageError(
                f"{self.name} takes {self.fps} frames a second, but how many the video has is not known: pass its fps"
            )
        return fps

    def wanted(self, total: int, fps: float | None, least: int = 1) -> int | None:
        """How many frames are taken, at `least` so many by the clock; None is all. Raises ImageError for more than there are."""
        if self.num_frames is None and self.fps is None:
            return None
        number = self.num_frames
        if number is None:
            assert self.fps is not None
            number = max(least, int(total / self.rate(fps) * self.fps))
        self.check(number, total)
        return number

    def check(self, number: int, total: int) -> None:
        """Raises ImageError where a video is too short."""
        if not 0 < number <= total:
            raise ImageError(f"{self.name} takes {number} frames and the video has {total}; pass a longer one, or set num_frames")


def arange(start: float, end: float, step: float) -> list[int]:
    """The whole parts of start, start + step, … below end (torch's `arange(…).int()`, which computes in float32)."""
    count = math.ceil((end - start) / step)
    return [int(np.float32(start + number * step)) for number in range(count)]


def _fingerprint(name: str, images: str, config: Config) -> str:
    stated = json.dumps([name, images, dict(config)], sort_keys=True, default=str)
    return hashlib.sha256(stated.encode()).hexdigest()
