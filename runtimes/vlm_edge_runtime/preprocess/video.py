"""Videos: which frames are taken, and how they become a vision encoder's batch. A new processor is one line of the table."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vlm_edge_runtime.errors import UnsupportedModelError

from .base import EncodedImage
from .blip import BlipImageProcessor
from .options import Config
from .video_frames import FrameProcessor, InternVLVideoProcessor, Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

# What a saved video processor says besides its image options, none of which touch the pixels of a frame.
_OF_VIDEOS = frozenset({"video_processor_type", "do_sample_frames", "num_frames", "fps", "return_metadata", "video_metadata"})


class SideFiles(Protocol):
    """What is read of an open bundle."""

    def has_file(self, name: str) -> bool: ...
    def read_json(self, name: str) -> dict[str, Any]: ...


class VideoProcessor(Protocol):
    """Frames in order → the first graph's inputs. `fingerprint` tells apart options that give other arrays."""

    fingerprint: str

    def __call__(self, frames: Sequence[Image.Image], fps: float | None = None) -> EncodedImage:
        """`frames`: decoded, all of one size. `fps`: frames in a second, where the source says. Raises ImageError."""


class InstructBlipVideoProcessor:
    """InstructBlipVideoVideoProcessor (transformers `models/instructblipvideo`): four frames, each as BLIP's images are.

    The model's processor writes tokens for exactly four frames. They are taken at even distances from the first on, as in the
    model's documentation: frame ⌊i · n / 4⌋ of n. transformers resizes them in torchvision, here it is Pillow: levels may
    differ by one.
    """

    frames = 4

    def __init__(self, config: Config) -> None:
        wanted = config.get("num_frames") if config.get("do_sample_frames") else None
        if wanted not in (None, self.frames) or (config.get("do_sample_frames") and config.get("fps")):
            raise UnsupportedModelError(
                f"video_preprocessor_config.json takes {wanted or 'a number of'} frames (fps={config.get('fps')}), and the model "
                f"reads {self.frames}: set num_frames to {self.frames} and fps to null."
            )
        own = {key: value for key, value in config.items() if key not in _OF_VIDEOS}
        self._images = BlipImageProcessor("InstructBlipVideoVideoProcessor", own)
        self.fingerprint = hashlib.sha256(f"{self.frames}/{self._images.fingerprint}".encode()).hexdigest()

    def __call__(self, frames: Sequence[Image.Image], fps: float | None = None) -> EncodedImage:
        """`pixel_values` float32 `[4, 3, H, W]`."""
        chosen = uniform_frames(len(frames), self.frames)
        encoded = [self._images(frames[index]) for index in chosen]
        pixels = np.concatenate([one.arrays["pixel_values"] for one in encoded])
        # A batch of so many rows: one, and those after it.
        return replace(encoded[0], arrays={"pixel_values": pixels}, rows=len(chosen) - 1, columns=1)


def uniform_frames(total: int, wanted: int) -> list[int]:
    """Indices of `wanted` out of `total` frames at even distances from the first on, as transformers samples by default."""
    return [min(int(index), total - 1) for index in np.arange(0, total, total / wanted)[:wanted]]


VIDEO_PROCESSORS: dict[str, Callable[[Config], VideoProcessor]] = {
    "InstructBlipVideoVideoProcessor": InstructBlipVideoProcessor,
    "InstructBlipVideoImageProcessor": InstructBlipVideoProcessor,
    "BlipImageProcessor": InstructBlipVideoProcessor,
    "LlavaOnevisionVideoProcessor": FrameProcessor,
    "InternVLVideoProcessor": InternVLVideoProcessor,
    "Qwen2VLVideoProcessor": Qwen2VLVideoProcessor,
    "Qwen3VLVideoProcessor": Qwen3VLVideoProcessor,
}
"""By the type that the saved options name. The last two are what checkpoints of older versions say."""


def load_video_processor(files: SideFiles) -> VideoProcessor | None:
    """The bundle's video processor; None where this version knows none of its type.

    Read, as transformers does, from `video_preprocessor_config.json`, else from `preprocessor_config.json`.
    """
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if files.has_file(name):
            config: Mapping[str, Any] = files.read_json(name)
            kind = str(config.get("video_processor_type") or config.get("image_processor_type"))
            make = VIDEO_PROCESSORS.get(kind.removesuffix("Fast").removesuffix("Pil"))
            return make(config) if make is not None else None
    return None
