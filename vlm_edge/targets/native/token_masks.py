"""Which pictures each token sees: masks and gates that a graph makes of `cross_attention_mask`, found by asking it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from .errors import NotExpressible
from .probe import part

TOKEN_MASK = "cross_attention_mask"
"""int64 [batch, sequence, images] or [batch, sequence, images, tiles]: not 0 where a token sees an image (a tile)."""
SOURCE_MASK = "encoder_attention_mask"
"""int64 [batch, source]: 0 for entries that are padding."""
_CASES = ((3, 1), (4, 2), (2, 3))
"""(tokens, images)"""


@dataclass(slots=True, frozen=True)
class MaskRule:
    """What decides whether a token sees an entry of static keys: `padding` SOURCE_MASK, `cells` TOKEN_MASK.

    `blind_sees_all`: a token that sees no image sees every entry that is no padding, instead of none.
    """

    padding: bool
    cells: bool
    blind_sees_all: bool = False


def mask_rule_of(model: ir.Model, mask: ir.Value) -> MaskRule:
    """What an additive mask [batch, 1, sequence, source] hides. Raises NotExpressible for any other rule.

    Every image (or tile) has as many entries as every other, one image after another.
    """
    session = part(model, [mask], [TOKEN_MASK, SOURCE_MASK, "inputs_embeds"])
    names = {one.name for one in session.get_inputs()}
    if TOKEN_MASK not in names:
        raise NotExpressible(f"a cross-attention mask that does not come from {TOKEN_MASK}")
    generator = np.random.default_rng(0)
    possible = [True, True]
    for tokens, images in _CASES:
        cells = _cells(model, tokens, images, generator)
        feeds: dict[str, npt.NDArray[Any]] = {TOKEN_MASK: cells, "inputs_embeds": _embeds(model, len(cells), tokens)}
        source = _run(session, {**feeds, SOURCE_MASK: np.ones((len(cells), 1), np.int64)}).shape[-1]
        count = int(np.prod(cells.shape[2:]))
        if source % count:
            raise NotExpressible(f"a cross-attention mask of {source} entries for {count} images")
        kept = generator.integers(0, 2, (len(cells), source))
        kept[:, 0] = 1
        found = _run(session, {**feeds, SOURCE_MASK: kept})
        by_cell = np.repeat(cells.reshape(len(cells), tokens, count) != 0, source // count, axis=2)
        blind = ~by_cell.any(-1, keepdims=True)
        for sees_all in (False, True):
            seen = (by_cell | (blind & sees_all)) & (kept[:, None] != 0 if SOURCE_MASK in names else True)
            possible[sees_all] = possible[sees_all] and _hides(found, seen[:, None])
    if not any(possible):
        raise NotExpressible(f"a cross-attention mask that is not {TOKEN_MASK}'s and {SOURCE_MASK}'s")
    return MaskRule(padding=SOURCE_MASK in names, cells=True, blind_sees_all=possible[True])


def seen_gate(model: ir.Model, value: ir.Value) -> tuple[str, bool]:
    """(input, True) for a value per token that is 1 where the token sees an image, (input, False) for one that is 0 there."""
    try:
        session = part(model, [value], [TOKEN_MASK, "inputs_embeds"])
    except NotExpressible as error:
        raise NotExpressible(f"a gate that is not {TOKEN_MASK}'s ({error})") from None
    if TOKEN_MASK not in {one.name for one in session.get_inputs()}:
        raise NotExpressible(f"a gate that is not {TOKEN_MASK}'s")
    generator, possible = np.random.default_rng(0), [True, True]
    for tokens, images in _CASES:
        cells = _cells(model, tokens, images, generator)
        found = _run(session, {TOKEN_MASK: cells, "inputs_embeds": _embeds(model, len(cells), tokens)}).astype(np.float64)
        sees = (cells.reshape(len(cells), tokens, -1) != 0).any(-1)
        if found.size == len(cells):
            sees = sees[:, -1:]  # of the last token alone
        if found.size != sees.size:
            raise NotExpressible("a gate that is not one number per token")
        for wanted in (False, True):
            possible[wanted] = possible[wanted] and np.array_equal(found.reshape(sees.shape), (sees == wanted).astype(np.float64))
    if not any(possible):
        raise NotExpressible(f"a gate that is not whether a token sees an image of {TOKEN_MASK}")
    return TOKEN_MASK, possible[True]


def constant_row(model: ir.Model, indices: ir.Value, rows: int) -> int | None:
    """The row of a table that `indices` [batch, sequence] name for every token (token types, say), None where they differ."""
    if rows == 1:
        return 0
    try:
        session = part(model, [indices], ["position_ids", "inputs_embeds"])
        found = [
            _run(session, {"position_ids": np.arange(tokens)[None] + start, "inputs_embeds": _embeds(model, 1, tokens)})
            for tokens, start in ((5, 0), (3, 4), (1, 2))
        ]
    except NotExpressible:
        return None
    first = int(found[0].reshape(-1)[0])
    return first if 0 <= first < rows and all((one == first).all() for one in found) else None


def _input(model: ir.Model, name: str) -> ir.Value:
    for value in model.graph.inputs:
        if value.name == name:
            return value
    raise NotExpressible(f"a decoder without an input '{name}'")


def _cells(model: ir.Model, tokens: int, images: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """A drawn mask of two rows; the first token sees nothing, the last one everything."""
    shape = _input(model, TOKEN_MASK).shape
    if shape is None or len(shape) not in (3, 4) or any(not isinstance(size, int) for size in shape[3:]):
        raise NotExpressible(f"a {TOKEN_MASK} of an unknown shape")
    tiles = [size for size in shape[3:] if isinstance(size, int)]
    cells = generator.integers(0, 2, (2, tokens, images, *tiles))
    cells[0, 0] = 0
    cells[-1, -1] = 1
    return cells


def _embeds(model: ir.Model, rows: int, tokens: int) -> npt.NDArray[np.float32]:
    shape = _input(model, "inputs_embeds").shape
    width = shape[2] if shape is not None and isinstance(shape[2], int) else 1
    return np.zeros((rows, tokens, width), np.float32)


def _run(session: ort.InferenceSession, feeds: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    try:
        (found,) = session.run(None, {one.name: feeds[one.name] for one in session.get_inputs()})
    except Exception as error:  # onnxruntime's errors share no base of their own
        raise NotExpressible(f"a mask that cannot be evaluated ({str(error).splitlines()[0]})") from None
    return np.asarray(found)


def _hides(found: npt.NDArray[Any], seen: npt.NDArray[np.bool_]) -> bool:
    try:
        wide = np.broadcast_to(seen, found.shape)
    except ValueError:
        return False
    return bool((found[wide] == 0).all() and (found[~wide] < -1e30).all())
