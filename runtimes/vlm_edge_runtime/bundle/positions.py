"""Parts of the manifest: which position each token of a row has. They are computed in text/positions.py."""

from __future__ import annotations

import msgspec


class _Struct(msgspec.Struct, forbid_unknown_fields=True):
    """Strict base: an unknown key is an error."""


class SequentialPositions(_Struct, kw_only=True, tag="sequential", tag_field="kind"):
    """position_ids `[batch, sequence]` = 0, 1, 2 … over the tokens of a row, plus `offset` and never below 0.

    PaliGemma counts from 1 (`offset` 1); GIT's text counts from 0 after a prefix of N tokens (`offset` −N).
    """

    offset: int = 0


class MRopePositions(_Struct, kw_only=True, tag="mrope", tag_field="kind"):
    """Qwen2-VL's M-RoPE: position_ids `[3, batch, sequence]` (time, height, width); text advances all three together,

    an image occupies a t × h × w block starting at the next free position (Qwen2-VL, arXiv 2409.12191, section 2.1).
    `tokens_per_second`: positions in a second of a video (Qwen2.5-VL, arXiv 2502.13923, section 2.1.3); without it a step is 1.
    """

    merge_size: int
    image_token_id: int
    vision_start_token_id: int
    tokens_per_second: float | None = None


Positions = SequentialPositions | MRopePositions
