"""Reading `preprocessor_config.json`: every option is known and typed, or refused by name.

As in transformers a key that is absent takes the processor class's default, null means "none" (a step that is off, a size that is
not given), and `size` may be spelt as an integer, a pair (height, width) or a dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vlm_edge_runtime.errors import UnsupportedModelError

from .ops import RESAMPLE_NAMES

Config = Mapping[str, Any]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

# Keys that never touch the pixels of an image: names, where and in which container to compute, video, text.
_INERT = frozenset(
    {
        "image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "_valid_processor_keys",
        "return_tensors", "device", "disable_grouping", "data_format", "input_data_format", "use_fast", "backend",
        "image_seq_length", "image_seq_len", "return_row_col_info", "video_sampling", "video_size",
    }
)  # fmt: skip
# Options that all of transformers' processors accept; one that a processor's own pipeline does not use changes nothing there.
_SHARED = frozenset(
    {
        "do_convert_rgb", "do_resize", "size", "default_to_square", "crop_size", "resample", "do_rescale", "rescale_factor",
        "do_normalize", "image_mean", "image_std", "do_pad", "pad_size", "do_center_crop",
    }
)  # fmt: skip
_SIZE_KEYS = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"longest_edge"},
    {"max_height", "max_width"},
    {"min_pixels", "max_pixels"},
)


@dataclass(frozen=True, slots=True)
class Size:
    """A target size in one of the spellings that transformers knows; the keys that were not given are None."""

    height: int | None = None
    width: int | None = None
    shortest_edge: int | None = None
    longest_edge: int | None = None
    max_height: int | None = None
    max_width: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __str__(self) -> str:
        return str({key: value for key, value in asdict(self).items() if value is not None})


@dataclass(frozen=True, slots=True)
class Options:
    """The options that every image processor shares, with its class's defaults filled in (lengths in pixels).

    `rescale_factor` is 1 where `do_rescale` is off; `image_mean` and `image_std` are never None where `do_normalize` is on.
    """

    processor: str
    do_convert_rgb: bool
    do_resize: bool
    size: Size
    resample: int
    do_center_crop: bool
    crop_size: Size | None
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: tuple[float, ...] | float | None
    image_std: tuple[float, ...] | float | None
    do_pad: bool
    pad_size: Size | None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What only this kind of processor reads (`patch_size`, `max_image_size`, `do_image_splitting` …)."""


def read_options(processor: str, config: Config, defaults: Config, extra: frozenset[str] = frozenset()) -> Options:
    """The options of `config` over `defaults`; `extra` names the ones this processor has of its own.

    Raises UnsupportedModelError for an unknown option that is not null or false, and for a value of the wrong kind.
    """
    unknown = sorted(
        key for key, value in config.items() if key not in _INERT | _SHARED | extra and value is not None and value is not False
    )
    if unknown:
        shown = ", ".join(f"{key}={config[key]!r}" for key in unknown)
        raise UnsupportedModelError(
            f"preprocessor_config.json of {processor} has options that are not known here and may change the pixels: {shown}; "
            f"known are {', '.join(sorted(_SHARED | extra))}"
        )
    reader = _Reader(processor, config, defaults)
    do_resize, do_rescale, do_normalize = reader.flag("do_resize"), reader.flag("do_rescale"), reader.flag("do_normalize")
    return Options(
        processor=processor,
        do_convert_rgb=reader.flag("do_convert_rgb"),
        do_resize=do_resize,
        size=reader.size("size", reader.flag("default_to_square")) or Size(),
        resample=reader.resample(required=do_resize),
        do_center_crop=reader.flag("do_center_crop"),
        crop_size=reader.size("crop_size", True),
        do_rescale=do_rescale,
        rescale_factor=reader.number("rescale_factor") if do_rescale else 1.0,
        do_normalize=do_normalize,
        image_mean=reader.channels("image_mean", do_normalize),
        image_std=reader.channels("image_std", do_normalize),
        do_pad=reader.flag("do_pad"),
        pad_size=reader.size("pad_size", True),
        extra={key: reader.get(key) for key in sorted(extra)},
    )


def positive(options: Options, key: str) -> int:
    """An own option that must be a positive integer."""
    value = options.extra[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedModelError(f"{key}={value!r} of {options.processor} is not a positive integer")
    return value


@dataclass(frozen=True, slots=True)
class _Reader:
    processor: str
    config: Config
    defaults: Config

    def get(self, key: str) -> Any:
        return self.config[key] if key in self.config else self.defaults.get(key)

    def error(self, key: str, expected: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{key}={self.get(key)!r} in preprocessor_config.json of {self.processor} is not supported; expected {expected}"
        )

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, (bool, int)):
            raise self.error(key, "true or false")
        return bool(value)

    def number(self, key: str) -> float:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, "a number")
        return float(value)

    def resample(self, required: bool) -> int:
        value = self.get("resample")
        if value is None and not required:
            return 2  # Idefics3 resizes its tiles even without do_resize; Pillow's wrapper then takes bilinear
        if isinstance(value, bool) or not isinstance(value, int) or value not in RESAMPLE_NAMES:
            raise self.error("resample", f"a Pillow filter number {RESAMPLE_NAMES}")
        return value

    def channels(self, key: str, required: bool) -> tuple[float, ...] | float | None:
        value = self.get(key)
        if value is None and not required:
            return None
        values = value if isinstance(value, (list, tuple)) else [value]
        if not values or any(isinstance(one, bool) or not isinstance(one, (int, float)) for one in values):
            raise self.error(key, "a number, or one number per channel")
        if key == "image_std" and 0 in values:
            raise self.error(key, "numbers other than 0, which are divided by")
        return tuple(float(one) for one in values) if isinstance(value, (list, tuple)) else float(value)

    def size(self, key: str, square: bool) -> Size | None:
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool):
            value = {"height": value, "width": value} if square else {"shortest_edge": value}
        elif isinstance(value, (list, tuple)) and len(value) == 2:
            value = {"height": value[0], "width": value[1]}
        if not isinstance(value, Mapping) or set(value) not in _SIZE_KEYS:
            spellings = ", ".join("{" + ", ".join(sorted(keys)) + "}" for keys in _SIZE_KEYS)
            raise self.error(key, f"an integer, (height, width), or a dictionary with exactly the keys of one of {spellings}")
        if any(isinstance(length, bool) or not isinstance(length, int) or length < 1 for length in value.values()):
            raise self.error(key, "positive integers")
        return Size(**value)
