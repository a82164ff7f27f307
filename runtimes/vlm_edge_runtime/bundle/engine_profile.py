"""Optimisation profiles of compiled engines, as the manifest names them."""

from __future__ import annotations

from typing import Literal

import msgspec


class ShapeRange(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The sizes one input may have in an optimisation profile: smallest, the one that it is fastest at, largest."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class EngineProfile(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One optimisation profile of an engine. `shapes` names every input that has a dynamic dimension.

    `use`: `prefill` (one row, many tokens), `decode` (all rows, one token each) or `any` (both, and graphs other than decoders).
    """

    use: Literal["prefill", "decode", "any"] = "any"
    shapes: dict[str, ShapeRange] = {}
