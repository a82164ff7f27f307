"""A row of tokens with its media in their places: what an embedding, an encoder and a decoder read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime import _native
from vlm_edge_runtime.bundle.manifest import GenerativeContract, Modality, PrefixPlaceholder
from vlm_edge_runtime.engines.base import Decoder
from vlm_edge_runtime.errors import BundleError, PromptError
from vlm_edge_runtime.text import image_tokens, placeholder_token

from .media import Features, Floats, Medium

Ids = npt.NDArray[np.int64]
NOWHERE: Ids = np.empty(0, np.int64)


@dataclass(slots=True, eq=False)
class Placed:
    """A medium and the indices of the tokens that stand for it, ascending; none where it is read as memory alone.

    Its tokens may be interleaved with markers (tiles), never with another medium's.
    """

    medium: Medium
    modality: Modality
    at: Ids = field(default_factory=lambda: NOWHERE)

    @property
    def fills(self) -> bool:
        """Whether its features (or codes) take the places of its tokens."""
        return self.modality.joins != "memory" and len(self.at) > 0


@dataclass(slots=True, eq=False)
class TokenRow:
    """`ids` int64 [S]: token ids, of which the first `prefix` are pseudo tokens of media that stand before the text.

    `placed`: its media in the order of their tokens.
    """

    ids: Ids
    placed: list[Placed]
    prefix: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def media(self) -> list[Medium]:
        """All media, in order."""
        return [one.medium for one in self.placed]

    @property
    def media_tokens(self) -> int:
        """How many tokens stand for features."""
        return sum(len(one.at) for one in self.placed if one.fills)

    def media_from(self, start: int) -> list[Medium]:
        """The media whose features fill a token at `start` or later."""
        return [one.medium for one in self.placed if one.fills and one.at[-1] >= start]

    def memory_media(self) -> list[Medium]:
        """The media that are read as memory."""
        return [one.medium for one in self.placed if one.modality.joins == "memory"]

    def content_ids(self) -> Ids:
        """What each token stands for (see prefix_cache): its id, or a number of the medium's content where features fill it."""
        content = self.ids.copy()
        for one in self.placed:
            if one.fills:
                content[one.at] = one.medium.content_id
        return content

    def embed(self, decoder: Decoder, start: int, end: int, features: Mapping[str, Features]) -> Floats:
        """Embeddings float32 [end − start, hidden] with features in their places; `features` has those of `media_from(start)`."""
        ids = self.ids[start:end].copy()
        marks = np.zeros(len(ids), np.int64)
        rows: list[Floats] = []
        for one in self.placed:
            if not one.fills:
                continue
            first, last = np.searchsorted(one.at, (start, end))
            if first == last:
                continue
            values = self._values(one, features)[first:last]
            at = one.at[first:last] - start
            if one.modality.joins == "codes":
                ids[at] = values
                continue
            ids[at] = 0  # a model may number its image token beyond the embedding's rows
            marks[at] = 1
            rows.append(np.asarray(values, np.float32))
        embeds = decoder.embed(np.ascontiguousarray(ids))
        if rows:
            embeds = np.require(embeds, np.float32, ["C", "W"])
            _native.merge_features(embeds, marks, 1, np.concatenate(rows))
        return embeds

    def _values(self, one: Placed, features: Mapping[str, Features]) -> npt.NDArray[np.generic]:
        values = features[one.medium.key].values
        if len(values) != len(one.at):
            raise BundleError(
                f"the {one.medium.kind} graphs gave {len(values)} features for an input of {len(one.at)} tokens: export again."
            )
        return values


def place(contract: GenerativeContract, ids: Sequence[int], media: Sequence[tuple[Medium, Modality]]) -> TokenRow:
    """Finds the tokens of each medium. `media`: in the order of their placeholders.

    Media with a PrefixPlaceholder get padding tokens in front. Raises PromptError when tokens and media do not match.
    """
    before = [_count(modality, medium) for medium, modality in media if _is_prefix(modality)]
    prefix = sum(before)
    row = np.concatenate([np.full(prefix, contract.pad_token_id, np.int64), np.asarray(ids, np.int64)])
    starts = iter(np.cumsum([0, *before]))
    placed = []
    tokens = {modality.token_id for modality in contract.modalities if modality.token_id is not None}
    found = {token: np.flatnonzero(row[prefix:] == token) + prefix for token in tokens}
    used = dict.fromkeys(tokens, 0)
    for medium, modality in media:
        at = NOWHERE
        if _is_prefix(modality):
            at = np.arange(_count(modality, medium), dtype=np.int64) + int(next(starts))
        elif modality.token_id is not None:
            count = _count(modality, medium)
            at = found[modality.token_id][used[modality.token_id] : used[modality.token_id] + count]
            used[modality.token_id] += count
        placed.append(Placed(medium, modality, at))
    for token, count in used.items():
        if count != len(found[token]):
            _refuse(contract, token, len(found[token]), count, media)
    return TokenRow(row, sorted(placed, key=lambda one: int(one.at[0]) if len(one.at) else -1), prefix)


def runs(at: Ids) -> list[tuple[int, int]]:
    """The unbroken stretches [start, end) of ascending indices."""
    found = []
    for _, group in groupby(enumerate(at.tolist()), key=lambda pair: pair[1] - pair[0]):
        members = [index for _, index in group]
        found.append((members[0], members[-1] + 1))
    return found


def _count(modality: Modality, medium: Medium) -> int:
    return 0 if modality.placeholder is None else image_tokens(modality.placeholder, medium.layout)


def _is_prefix(modality: Modality) -> bool:
    return isinstance(modality.placeholder, PrefixPlaceholder)


def _refuse(contract: GenerativeContract, token: int, found: int, count: int, media: Sequence[tuple[Medium, Modality]]) -> None:
    modality = next(one for one in contract.modalities if one.token_id == token)
    given = sum(one.token_id == token for _, one in media)
    raise PromptError(
        f"the prompt has {found} {modality.kind} tokens (id {token}), its {given} {modality.kind}s make {count}: does the text "
        f"itself spell {placeholder_token(modality.placeholder)!r}?"
    )
