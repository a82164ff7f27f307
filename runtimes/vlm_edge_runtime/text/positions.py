"""Position ids of a whole prompt, computed on the host because they depend on the images in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.bundle.manifest import MRopePositions, Positions, SequentialPositions
from vlm_edge_runtime.errors import PromptError

from .placeholders import ImageLayout

Ids = npt.NDArray[np.int64]


def position_ids(
    positions: Positions,
    input_ids: Sequence[int] | Ids,
    images: Sequence[ImageLayout] = (),
    at: Sequence[Ids] | None = None,
) -> tuple[Ids, int]:
    """The positions of a prompt's tokens, and the position of the first token that will be generated.

    `input_ids`: one row [S], image placeholders expanded, no padding. Sequential: int64 `[S]`, by an offset where the contract
    has one. M-RoPE: int64 `[3, S]` (time, height, width): text advances all three together; an image fills a t × h × w block (h
    and w in merged patches) that starts at the next free position, and the text after it goes on at the block's longest side
    (Qwen2-VL, arXiv 2409.12191, section 2.1; transformers' `get_rope_index`). `images`: images and videos in the order of their
    tokens. `at`: the indices of each one's tokens; by default the row's image tokens, in order. A video whose t frames stand
    apart, with text between, is t blocks of 1 × h × w.

    Raises PromptError when image tokens and images do not match.
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    if isinstance(positions, SequentialPositions):
        every = np.maximum(np.arange(len(ids) + 1, dtype=np.int64) + positions.offset, 0)
        return every[:-1], int(every[-1])
    result = np.empty((3, len(ids)), np.int64)
    here = following = 0  # index of the next token, next free position
    for start, block, interval in _blocks(positions, ids, images, at):
        result[:, here:start] = np.arange(following, following + start - here)
        following += start - here
        here = start + int(np.prod(block))
        steps, *squares = np.indices(block).reshape(3, -1)
        # In float32 and cut off, as transformers does it.
        result[:, start:here] = following + np.stack([(steps * np.float32(interval)).astype(np.int64), *squares])
        following += max(block[1], block[2])
    result[:, here:] = np.arange(following, following + len(ids) - here)
    return result, int(result.max()) + 1 if len(ids) else 0


def _blocks(
    positions: MRopePositions, ids: Ids, images: Sequence[ImageLayout], at: Sequence[Ids] | None
) -> Iterator[tuple[int, tuple[int, int, int], float]]:
    """The index of each block's first token, its size, and how far apart its steps are in time."""
    blocks = [_block(image, positions.merge_size) for image in images]
    sizes = [int(np.prod(block)) for block in blocks]
    if at is None:
        tokens = np.flatnonzero(ids == positions.image_token_id)
        if len(tokens) != sum(sizes):
            raise PromptError(f"the prompt has {len(tokens)} image tokens and its {len(images)} images need {sum(sizes)}")
        at = np.split(tokens, np.cumsum(sizes)[:-1]) if sizes else []
    for image, (time, height, width), size, own in zip(images, blocks, sizes, at, strict=True):
        if len(own) != size:
            raise PromptError(f"an image has {len(own)} tokens in the prompt and needs {size}")
        breaks = np.flatnonzero(np.diff(own) != 1) + 1
        frames = np.split(own, breaks)
        if len(frames) == 1:
            yield int(own[0]), (time, height, width), _interval(positions, image)
        elif len(frames) == time and {len(frame) for frame in frames} == {height * width}:
            yield from ((int(frame[0]), (1, height, width), 1.0) for frame in frames)
        else:
            raise PromptError(f"an image of {size} tokens is interrupted by other tokens after {int(breaks[0])}")


def _interval(positions: MRopePositions, image: ImageLayout) -> float:
    """Positions between two time steps: 1, or by the clock for the videos of a model that counts seconds."""
    seconds: float | None = getattr(image, "seconds_per_step", None)
    if positions.tokens_per_second is None or seconds is None:
        return 1.0
    return float(np.float32(positions.tokens_per_second) * np.float32(seconds))


def _block(image: ImageLayout, merge: int) -> tuple[int, int, int]:
    if image.grid is None:
        raise PromptError("the image has no grid of patches; the bundle's image processor does not fit its position rule")
    time, height, width = image.grid
    return time, height // merge, width // merge


__all__ = ["MRopePositions", "SequentialPositions", "position_ids"]
