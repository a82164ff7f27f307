"""Parts of the manifest: what stands for an image in the prompt. Those of images of many sizes are in vision_layout.py."""

from __future__ import annotations

import msgspec

from .vision_layout import (
    AnyResolutionPlaceholder,
    FramedTilesPlaceholder,
    LabelledFramesPlaceholder,
    MarkedTilesPlaceholder,
    PatchRowsPlaceholder,
    PooledFramesPlaceholder,
    TimedFramesPlaceholder,
)


class _Struct(msgspec.Struct, forbid_unknown_fields=True):
    """Strict base: an unknown key is an error."""


class FixedPlaceholder(_Struct, kw_only=True, tag="fixed", tag_field="kind"):
    """Every image becomes the same number of image tokens (LLaVA: `<image>` × tokens_per_image), between two texts."""

    image_token: str
    tokens_per_image: int
    before: str = ""
    after: str = ""


class TilePlaceholder(_Struct, kw_only=True, tag="tiles", tag_field="kind"):
    """Idefics3/SmolVLM: an image is split into rows × columns tiles and one global view, each framed by its own tokens.

    One tile: `{fake_token}{row_column_format.format(row=1, column=1)}{image_token × tokens_per_tile}`; rows end with a
    newline; the global view is `\\n{fake_token}{global_token}{image_token × tokens_per_tile}{fake_token}`.
    An image that was not split is the global view alone, without the newline before it.
    """

    image_token: str
    fake_token: str
    global_token: str
    row_column_format: str = "<row_{row}_col_{column}>"
    tokens_per_tile: int


class CropsPlaceholder(_Struct, kw_only=True, tag="crops", tag_field="kind"):
    """Gemma 3: `{before}{soft_token × tokens_per_image}{after}` takes the place of `image_token`.

    An image that was also cut into crops (rows × columns of them, after the whole image in its batch) is `crops`, in which
    `{image}` is the whole image's frame and `{crops}` one frame per crop, blanks between.
    """

    image_token: str
    soft_token: str
    before: str
    after: str
    tokens_per_image: int
    crops: str


class FencedPlaceholder(_Struct, kw_only=True, tag="fenced", tag_field="kind"):
    """IDEFICS: an image is one token between two fences, `{fence}{image_token}{fence}`; images in a row share those between."""

    image_token: str
    fence: str


class GridPlaceholder(_Struct, kw_only=True, tag="grid", tag_field="kind"):
    """Qwen2-VL: `<|image_pad|>` × (t · h · w / merge_size²), from the grid of patches the image was cut into."""

    image_token: str
    merge_size: int


class PrefixPlaceholder(_Struct, kw_only=True, tag="prefix", tag_field="kind"):
    """GIT, SimVLM: the features stand before the prompt's tokens, and nothing in the text stands for them.

    Each image puts so many pseudo tokens (the padding id) in front of the row; the features take their places.
    """

    tokens_per_image: int


Placeholder = (
    FixedPlaceholder
    | PrefixPlaceholder
    | FencedPlaceholder
    | TilePlaceholder
    | CropsPlaceholder
    | GridPlaceholder
    | AnyResolutionPlaceholder
    | FramedTilesPlaceholder
    | MarkedTilesPlaceholder
    | PatchRowsPlaceholder
    | PooledFramesPlaceholder
    | TimedFramesPlaceholder
    | LabelledFramesPlaceholder
)
