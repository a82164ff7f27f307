"""Parts of the manifest for images that become different numbers of tokens: what the host computes from an image's size.

Two kinds: what stands for an image in the prompt (placeholders), and arrays of indices that vision graphs take beside the pixels
(geometry). All counts are of patches or tokens; `merge` is the side of the square of patches that becomes one token.
"""

from __future__ import annotations

import msgspec


class _Placeholder(msgspec.Struct, kw_only=True, tag_field="kind", forbid_unknown_fields=True):
    """Strict base of the placeholders here."""

    image_token: str


class AnyResolutionPlaceholder(_Placeholder, tag="any_resolution"):
    """LLaVA-NeXT: `image_token` × the features of the whole image, then of its tiles put back together.

    The vision graphs give `side`² features for each tile and one more row, the learned end of a line. The tiles' features form
    one picture of (rows · side) × (columns · side), from which the padding is cut; every line of it ends with that row.
    `max_tiles`: where the picture has over 1.1² times the features of so many tiles, it is made smaller (bilinear) to fit
    (LLaVA-OneVision's "anyres_max_9", arXiv 2408.03326, section 3.2); 0 never does. An image that was not cut is its own
    features and the row.
    """

    side: int
    max_tiles: int = 0


class FramedTilesPlaceholder(_Placeholder, tag="framed_tiles"):
    """InternVL: `{start_token}{image_token × tokens_per_tile × tiles}{end_token}`, the whole image after its tiles."""

    start_token: str
    end_token: str
    tokens_per_tile: int


class MarkedTilesPlaceholder(_Placeholder, tag="marked_tiles"):
    """Aya Vision, Command A Vision: each tile between marks of its own, the whole image after its tiles.

    With T standing for `{soft_token × tokens_per_tile}{tile_end}`, `{start}({tile}T) × tiles {whole}T{end}` takes the place of
    `image_token`; `{number}` in `tile` counts from 1. An image that was not cut is the whole one alone.
    """

    soft_token: str
    start: str
    tile: str
    whole: str
    tile_end: str
    end: str
    tokens_per_tile: int


class PatchRowsPlaceholder(_Placeholder, tag="patch_rows"):
    """Pixtral: a line of `image_token`s per row of (merged) patches; `break_token` after each but the last, then `end_token`."""

    break_token: str
    end_token: str
    merge: int = 1


class PooledFramesPlaceholder(_Placeholder, tag="pooled_frames"):
    """LLaVA-OneVision's videos: the features of each frame, `side`² of them, made half as many along both sides (bilinear), then

    one row that ends the video. The graphs give side² features and that row for each frame.
    """

    side: int


class TimedFramesPlaceholder(_Placeholder, tag="timed_frames"):
    """Qwen3-VL's videos: `<1.5 seconds>{start_token}{image_token × tokens}{end_token}` for each time step of its grid."""

    start_token: str
    end_token: str
    merge_size: int


class LabelledFramesPlaceholder(_Placeholder, tag="labelled_frames"):
    """InternVL's videos: `Frame1: {start_token}{frame_token × tokens_per_frame}{end_token}` for each, on its line."""

    frame_token: str
    start_token: str
    end_token: str
    tokens_per_frame: int


class _Geometry(msgspec.Struct, kw_only=True, tag_field="kind", forbid_unknown_fields=True):
    """Strict base of the geometry rules."""


class WindowGeometry(_Geometry, tag="windows"):
    """Qwen2.5-VL's window attention (arXiv 2502.13923, section 2.1.1): patches are put in the order of their windows.

    `window`: the side of a window in tokens. Gives int64 `patch_order [patches]` (the patch at each place of that order),
    `window_ids [patches]` (in that order: patches with the same number see each other) and `token_order [tokens]` (where each
    token, in reading order, stands among the features).
    """

    merge: int
    window: int


class InterpolationGeometry(_Geometry, tag="interpolation"):
    """Qwen3-VL: a learned square of `side` × `side` position embeddings, resampled (bilinear) to the image's grid.

    Gives `interpolation_indices` int64 and `interpolation_weights` float32, both `[patches, 4]`. With `align_corners` the
    corner patches have the corner embeddings, otherwise patches are squares that divide the side.
    """

    merge: int
    side: int
    align_corners: bool = True


class MergeGeometry(_Geometry, tag="merge"):
    """Mistral 3's patch merger: int64 `merge_index [tokens, merge²]`, the patches (in reading order) of each token."""

    merge: int


Geometry = WindowGeometry | InterpolationGeometry | MergeGeometry
