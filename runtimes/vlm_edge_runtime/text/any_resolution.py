"""The picture that the features of an image's tiles form, as LLaVA-NeXT and LLaVA-OneVision read it.

An image was fitted into rows × columns of tiles and padded; its features, side² for each tile, are put back together, and the
lines and columns that only saw padding are cut off again (transformers' `unpad_image` and `pack_image_features`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_SLACK = 1.1
"""A picture is made smaller only beyond this much above its largest side (transformers' figure)."""


@dataclass(slots=True, frozen=True)
class FeaturePicture:
    """`height` × `width` features, cut by `top` lines and `left` columns on both sides; that becomes `lines` × `columns`."""

    height: int
    width: int
    top: int
    left: int
    lines: int
    columns: int

    @property
    def tokens(self) -> int:
        """All features, and one more that ends each line."""
        return self.lines * (self.columns + 1)


def feature_picture(side: int, tiles: tuple[int, int], size: tuple[int, int], max_tiles: int = 0) -> FeaturePicture:
    """The picture of an image of `size` = (height, width) pixels cut into `tiles` = (rows, columns) of side × side features."""
    height, width = tiles[0] * side, tiles[1] * side
    top = left = 0
    # The roundings are transformers' own: seven digits before the fraction is cut off.
    if size[1] / size[0] > width / height:
        top = (height - int(round(size[0] * (width / size[1]), 7))) // 2
    else:
        left = (width - int(round(size[1] * (height / size[0]), 7))) // 2
    lines, columns = height - 2 * top, width - 2 * left
    if max_tiles:
        ratio = math.sqrt(lines * columns / (max_tiles * side**2))
        if ratio > _SLACK:
            lines, columns = int(lines // ratio), int(columns // ratio)
    return FeaturePicture(height, width, top, left, lines, columns)
