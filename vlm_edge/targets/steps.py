"""One decoder step in two signatures: the portable decoder's, and that of a decoder on a shared KV buffer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .samples import PAST, Feeds

STEPS = ((1, 7, 0, 0), (1, 3, 9, 0), (1, 1, 20, 0), (3, 1, 12, 2))
"""(rows, new tokens, past, padded entries of the first row) that a lowered decoder is tried on: prefill, a chunk after a past,

decode, and rows of unlike length that decode together.
"""
_LENGTHS = ("seqlens_k", "total_sequence_length")


def is_shared(names: Sequence[str]) -> bool:
    """Whether a decoder with these inputs keeps its cache in a shared buffer."""
    return "seqlens_k" in names


def is_static(names: Sequence[str]) -> bool:
    """Whether a decoder with these inputs keeps its cache in slots of a static capacity (TensorRT's form)."""
    return "past_lengths" in names


def padding_of(portable: Feeds) -> npt.NDArray[np.int64]:
    """Padded entries at the beginning of each row, int64 [rows]."""
    rows = len(portable["inputs_embeds"])
    mask = portable.get("attention_mask")
    return np.zeros(rows, np.int64) if mask is None else np.asarray((mask == 0).sum(-1), np.int64)


def shared_feeds(portable: Feeds, *, capacity: int) -> Feeds:
    """The same step for a decoder on a shared buffer: the valid entries of each row from slot 0 on, no mask.

    Rows of one step have the same number of new tokens, none of them padding.
    """
    padding, sequence = padding_of(portable), portable["inputs_embeds"].shape[1]
    cache = next((array for name, array in portable.items() if name.startswith(PAST)), None)
    past = cache.shape[2] if cache is not None else 0
    lengths = past - padding + sequence
    feeds: Feeds = {name: array for name, array in portable.items() if name != "attention_mask" and not name.startswith(PAST)}
    feeds["seqlens_k"] = (lengths - 1).astype(np.int32)
    feeds["total_sequence_length"] = np.array([lengths.max()], np.int32)
    for name, array in portable.items():
        if name.startswith(PAST):
            rows, heads, _, size = array.shape
            feeds[name] = np.zeros((rows, heads, capacity, size), array.dtype)
            for row, skipped in enumerate(padding):
                feeds[name][row, :, : past - skipped] = array[row, :, skipped:]
    return feeds


def static_cache_feeds(portable: Feeds, *, capacity: int) -> Feeds:
    """The same step for a decoder on a cache of static capacity: the valid entries of each row from slot 0 on, the rest noise.

    Slots that are not written yet hold numbers that would show, had the mask let them through. Rows of one step have the same
    number of new tokens, none of them padding.
    """
    padding, random = padding_of(portable), np.random.default_rng(0)
    past = next((array.shape[2] for name, array in portable.items() if name.startswith(PAST)), 0)
    feeds: Feeds = {name: array for name, array in portable.items() if name != "attention_mask" and not name.startswith(PAST)}
    feeds["past_lengths"] = (past - padding).astype(np.int32)
    for name, array in portable.items():
        if name.startswith(PAST):
            rows, heads, _, size = array.shape
            feeds[name] = (7.0 * random.standard_normal((rows, heads, capacity, size))).astype(array.dtype)
            for row, skipped in enumerate(padding):
                feeds[name][row, :, : past - skipped] = array[row, :, skipped:]
    return feeds


def row_of(portable: Feeds, row: int, *, sequence_inputs: Sequence[str], rows_inputs: Sequence[str]) -> Feeds:
    """One row of a portable step by itself, without its padding. See `split_inputs` for the names."""
    skipped = int(padding_of(portable)[row])
    sequence = portable["inputs_embeds"].shape[1]
    past = portable["attention_mask"].shape[1] - sequence if "attention_mask" in portable else 0
    new = max(0, skipped - past)
    feeds: Feeds = {}
    for name, array in portable.items():
        if name == "attention_mask":
            feeds[name] = array[row : row + 1, skipped:]
        elif name == "position_ids":
            feeds[name] = array[..., row : row + 1, new:]
        elif name.startswith(PAST):
            feeds[name] = array[row : row + 1, :, min(skipped, past) :]
        elif name in sequence_inputs:
            feeds[name] = array[row : row + 1, new:]
        else:
            feeds[name] = array[row : row + 1] if name in rows_inputs else array
    return feeds


def split_inputs(specs: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Names of a decoder's inputs with a value per token, and of those with one per row (`[batch, …]`)."""
    tokens = [spec.name for spec in specs if spec.shape[:2] == ("batch", "sequence")]
    return tokens, [spec.name for spec in specs if spec.shape[:1] == ("batch",)]


def laid_beside(
    found: Mapping[str, npt.NDArray[Any]], wanted: Mapping[str, npt.NDArray[Any]], portable: Feeds
) -> Iterator[tuple[str, npt.NDArray[Any], npt.NDArray[Any]]]:
    """(name, found, wanted) of each output of a portable step, in equal shapes: the last token's logits, the valid entries.

    An output that is missing is left out.
    """
    padding = padding_of(portable)
    for name, expected in wanted.items():
        if name not in found:
            continue
        got = found[name]
        if name == "logits":
            yield name, got[:, -1:], expected[:, -1:]
        elif name.startswith("present.") and got.ndim == 4 and got.shape != expected.shape:
            for row, skipped in enumerate(padding):
                rest = expected[row : row + 1, :, skipped:]
                yield name, got[row : row + 1, :, : rest.shape[2]], rest
        elif got.ndim == expected.ndim and got.ndim > 1 and got.shape[1] == 1 < expected.shape[1]:
            yield name, got, expected[:, -1:]  # computed for the last token only
        else:
            yield name, got, expected
