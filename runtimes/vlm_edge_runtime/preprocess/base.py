"""What an image processor is: saved options in, one image's arrays and layout out."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlm_edge_runtime.errors import ImageError, UnsupportedModelError

from .geometry import bounded_edges_size, fit_inside_size, shortest_edge_size
from .image import ImageLike, load_image, to_channels, to_rgb
from .ops import Floats, Patches, Pixels, center_crop, normalize, pad_bottom_right, resize
from .options import Config, Options, Size, read_options

# Part of every fingerprint: raise it when the same options come to give other pixels.
_ARITHMETIC = 1
_COMMON_DEFAULTS: dict[str, Any] = {"default_to_square": True, "rescale_factor": 1 / 255}


@dataclass(slots=True)
class EncodedImage:
    """One image, ready for the vision encoder.

    `arrays`: the graph's inputs by name; `pixel_values` float32 is `[1, 3, H, W]`, `[tiles, 3, h, w]` or `[patches, dim]`.
    `size`: (height, width) of the image as it came in, upright.
    `rows`, `columns`: the tiles it was split into, in reading order before the global view; both 0 when it was not split.
    `grid`: (t, h, w) in patches, where the model wants it.
    `tokens`: how many image tokens the language model will see, when the processor's own files tell.
    `timestamps`: of a video, the second of each time step; `seconds_per_step`: how far they are apart; where the model asks.
    """

    arrays: dict[str, npt.NDArray[np.generic]]
    size: tuple[int, int]
    rows: int = 0
    columns: int = 0
    grid: tuple[int, int, int] | None = None
    tokens: int | None = None
    timestamps: tuple[float, ...] = ()
    seconds_per_step: float | None = None

    @property
    def tiles(self) -> int:
        """Rows of the vision encoder's batch that this image takes: its tiles and the global view, or 1."""
        return self.rows * self.columns + 1


class ImageProcessor(ABC):
    """An image processor of transformers, rebuilt from its saved options alone. Safe to call from several threads."""

    defaults: ClassVar[Mapping[str, Any]]
    """The options' defaults in transformers' class of the same name."""
    own_options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, name: str, config: Config, processor_config: Config | None = None) -> None:
        self.name = name
        defaults = {**_COMMON_DEFAULTS, **self.defaults}
        self.options: Options = read_options(name, self.prepare(dict(config)), defaults, self.own_options)
        self.processor_config: Config = processor_config or {}
        self.check()
        self.fingerprint = self._fingerprint()

    def prepare(self, config: dict[str, Any]) -> dict[str, Any]:
        """Translates older spellings of options before they are read."""
        return config

    @abstractmethod
    def check(self) -> None:
        """Raises UnsupportedModelError for options that do not fit together, at load time and not at the first image."""

    @abstractmethod
    def encode(self, pixels: Pixels, size: tuple[int, int]) -> EncodedImage:
        """The work proper, on uint8 `[height, width, channels]`."""

    def __call__(self, image: ImageLike) -> EncodedImage:
        """Encodes one image. Raises ImageError for what is not an image or cannot be brought to the model's size."""
        loaded: Image.Image = load_image(image)
        pixels = to_rgb(loaded) if self.options.do_convert_rgb else to_channels(loaded)
        return self.encode(pixels, (loaded.height, loaded.width))

    def normalize(self, *frames: Pixels, patches: Patches | None = None, out: Floats | None = None) -> Floats:
        """`do_rescale` and `do_normalize`: frames uint8 `[height, width, channels]`, all of one size, → float32

        `[frames, channels, height, width]`, or cut into `patches`; in `out`, where that is given.
        """
        options = self.options
        channels = frames[0].shape[2]
        mean, std = (options.image_mean, options.image_std) if options.do_normalize else (0.0, 1.0)
        means, deviations = self.per_channel(mean, channels), self.per_channel(std, channels)
        return normalize(frames, options.rescale_factor, means, deviations, patches, out)

    def per_channel(self, values: tuple[float, ...] | float | None, channels: int) -> tuple[float, ...]:
        """One value for each channel. Raises ImageError where the image has another number of channels than the options."""
        if not isinstance(values, tuple):
            return (values or 0.0,) * channels
        if len(values) != channels:
            raise ImageError(
                f"the image has {channels} channel{'s' * (channels > 1)} and {self.name} normalises {len(values)}; "
                "convert the image to RGB, or set do_convert_rgb in preprocessor_config.json"
            )
        return values

    def _fingerprint(self) -> str:
        stated = json.dumps([_ARITHMETIC, asdict(self.options)], sort_keys=True)
        return hashlib.sha256(stated.encode()).hexdigest()


class FixedSizeProcessor(ImageProcessor):
    """The pipeline that most processors share: resize, centre crop, rescale, normalise, pad → `pixel_values [1, C, H, W]`."""

    def check(self) -> None:
        options = self.options
        if options.do_resize:
            resized_size(options.size, 64, 64, self.name)
        if options.do_center_crop:
            _height_width(options.crop_size, "crop_size", self.name)
        if options.do_pad and options.pad_size is not None:
            _height_width(options.pad_size, "pad_size", self.name)

    def encode(self, pixels: Pixels, size: tuple[int, int]) -> EncodedImage:
        options = self.options
        if options.do_resize:
            height, width, _ = pixels.shape
            pixels = resize(pixels, resized_size(options.size, height, width, self.name), options.resample)
        if options.do_center_crop:
            pixels = center_crop(pixels, _height_width(options.crop_size, "crop_size", self.name))
        (planes,) = self.normalize(pixels)
        if options.do_pad and options.pad_size is not None:
            planes = pad_bottom_right(planes, _height_width(options.pad_size, "pad_size", self.name))
        return EncodedImage({"pixel_values": planes[None]}, size, tokens=self._tokens(planes.shape[1], planes.shape[2]))

    def _tokens(self, height: int, width: int) -> int | None:
        """Image tokens as LlavaProcessor counts them, where `processor_config.json` gives the patch size."""
        patch = self.processor_config.get("patch_size")
        if not isinstance(patch, int) or patch < 1:
            return None
        tokens = (height // patch) * (width // patch) + int(self.processor_config.get("num_additional_image_tokens") or 0)
        return tokens - 1 if self.processor_config.get("vision_feature_select_strategy") == "default" else tokens


def resized_size(size: Size, height: int, width: int, name: str) -> tuple[int, int]:
    """(height, width) after resizing by `size`, as transformers' PilBackend.resize reads it."""
    if size.shortest_edge and size.longest_edge:
        return bounded_edges_size(height, width, size.shortest_edge, size.longest_edge)
    if size.shortest_edge:
        return shortest_edge_size(height, width, size.shortest_edge)
    if size.max_height and size.max_width:
        return fit_inside_size(height, width, size.max_height, size.max_width)
    return _height_width(size, "size", name, "'shortest_edge' (and 'longest_edge'), 'max_height' and 'max_width', or ")


def _height_width(size: Size | None, key: str, name: str, also: str = "") -> tuple[int, int]:
    if size is None or not size.height or not size.width:
        raise UnsupportedModelError(f"{key} of {name} must give {also}'height' and 'width'; found {size}")
    return size.height, size.width
