"""Position ids of a whole prompt, computed on the host because they depend on the images in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.bundle.manifest import MRopePositions, Positions, SequentialPositions
from vlm_edge_runtime.errors import PromptError

from .placeholders import ImageLayout

Ids = npt.NDArray[np.int64]


def position_ids(positions: Positions, input_ids: Sequence[int] | Ids, images: Sequence[ImageLayout] = ()) -> tuple[Ids, int]:
    """The positions of a prompt's tokens, and the position of the first token that will be generated.

    `input_ids`: one row [S], image placeholders expanded, no padding. Sequential: int64 `[S]`, by an offset where the contract
    has one. M-RoPE: int64 `[3, S]` (time, height, width): text advances all three together; an image fills a t × h × w block (h
    and w in merged patches) that starts at the next free position, and the text after it goes on at the block's longest side
    (Qwen2-VL, arXiv 2409.12191, section 2.1; transformers' `get_rope_index`).

    Raises PromptError when image tokens and images do not match.
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    if isinstance(positions, SequentialPositions):
        every = np.maximum(np.arange(len(ids) + 1, dtype=np.int64) + positions.offset, 0)
        return every[:-1], int(every[-1])
    is_image = ids == positions.image_token_id
    counts = [_block(image, positions.merge_size) for image in images]
    expected = sum(int(np.prod(block)) for block in counts)
    if expected != int(is_image.sum()):
        raise PromptError(f"the prompt has {int(is_image.sum())} image tokens and its {len(images)} images need {expected}")

    result = np.empty((3, len(ids)), np.int64)
    here = following = 0  # index of the next token, next free position
    image_starts = np.flatnonzero(is_image)
    consumed = 0
    for block in counts:
        start, size = int(image_starts[consumed]), int(np.prod(block))
        if not is_image[start : start + size].all():
            raise PromptError(f"an image of {size} tokens is interrupted by other tokens after {int(is_image[start:].argmin())}")
        result[:, here:start] = np.arange(following, following + start - here)
        following += start - here
        result[:, start : start + size] = following + np.indices(block).reshape(3, -1)
        following += max(block[1], block[2])
        here, consumed = start + size, consumed + size
    result[:, here:] = np.arange(following, following + len(ids) - here)
    return result, int(result.max()) + 1 if len(ids) else 0


def _block(image: ImageLayout, merge: int) -> tuple[int, int, int]:
    if image.grid is None:
        raise PromptError("the image has no grid of patches; the bundle's image processor does not fit its position rule")
    time, height, width = image.grid
    return time, height // merge, width // merge


__all__ = ["MRopePositions", "SequentialPositions", "position_ids"]
