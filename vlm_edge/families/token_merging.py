"""Fewer visual tokens, chosen at export: a graph `token_merger` after the projector that averages those most alike.

Token merging (ToMe, arXiv 2210.09461, section 3) on an image's or tile's projected tokens. In a round, tokens at even places look
for the most similar one (cosine) among those at odd places; the pairs most alike become one token, the average of all that went
into it. A round takes at most half of the tokens away, so several follow one another where fewer are kept.

What is unlike the paper: it merges between the layers of a vision transformer and lets a token weigh in attention by how many
it stands for (section 3, "proportional attention"), which a language model's decoder, compiled as it is, has no place for. The
averages are weighted by size all the same. Tokens that are left keep their order, so that a decoder's positions, counted along
the prompt, go on saying which part of the picture comes first.

All sizes are fixed at export, and every operation has a form without data-dependent shapes: the choice is made by comparing
numbers with each other, and a round's averages are one matrix product.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import torch

from vlm_edge_runtime.bundle.manifest import (
    CropsPlaceholder,
    FixedPlaceholder,
    GenerativeContract,
    Modality,
    SequentialPositions,
    TilePlaceholder,
)
from vlm_edge_runtime.bundle.vision_layout import FramedTilesPlaceholder, LabelledFramesPlaceholder, MarkedTilesPlaceholder
from vlm_edge_runtime.errors import ExportError, UnsupportedModelError

from .base import Case, GraphPlan, Split, Tensors, float32

ROLE = "token_merger"
_COUNTS: dict[type, str] = {
    FixedPlaceholder: "tokens_per_image",
    CropsPlaceholder: "tokens_per_image",
    TilePlaceholder: "tokens_per_tile",
    FramedTilesPlaceholder: "tokens_per_tile",
    MarkedTilesPlaceholder: "tokens_per_tile",
    LabelledFramesPlaceholder: "tokens_per_frame",
}
"""Placeholders of images whose every picture has the same number of tokens, in no grid that the prompt or the host knows of."""


def kept_tokens(wanted: str, tokens: int) -> int:
    """How many of an image's (or tile's) `tokens` are left. `wanted`: `50%` merges half of them away, `64` keeps so many.

    Raises ExportError for anything else, and for more than there are or fewer than one.
    """
    share = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", wanted.strip())
    if share is not None:
        kept = tokens - int(tokens * float(share[1]) / 100 + 0.5)
    elif wanted.strip().isdecimal():
        kept = int(wanted)
    else:
        raise ExportError(f"Merging visual tokens takes a share to merge away (50%) or a number to keep (64), not '{wanted}'.")
    if not 1 <= kept <= tokens:
        raise ExportError(f"Merging visual tokens by '{wanted}' would leave {kept} of {tokens}: leave 1 to {tokens}.")
    return kept


def merging(split: Split, wanted: str | None) -> Split:
    """The split with a graph that merges the visual tokens of each image or tile; itself where nothing is to be merged.

    Raises UnsupportedModelError, before anything is traced, for a model in which an image's tokens are not a plain row of a fixed
    number: what stands in the prompt, positions or further layers would no longer fit them.
    """
    if wanted is None:
        return split
    contract = _mergeable(split)
    projector = next(plan for plan in split.graphs if plan.role == "projector")
    features = projector.outputs[0]
    tokens = features.shape[1]
    assert isinstance(tokens, int)  # a layout without sizes of its own was refused
    kept = kept_tokens(wanted, tokens)
    if kept == tokens:
        return split
    merger = merger_plan(projector, tokens, kept)
    at = split.graphs.index(projector) + 1
    modalities = [_merged(one, kept) if "projector" in one.graphs else one for one in contract.modalities]
    return Split((*split.graphs[:at], merger, *split.graphs[at:]), msgspec.structs.replace(contract, modalities=modalities))


def merger_plan(projector: GraphPlan, tokens: int, kept: int) -> GraphPlan:
    """The graph after `projector`: `image_features [images, tokens, hidden]` → `merged_image_features [images, kept, hidden]`."""
    features = projector.outputs[0]

    def sample(case: Case) -> Tensors:
        with torch.no_grad():
            return projector.reference(case, projector.sample(case))[:1]

    return GraphPlan(
        role=ROLE,
        module=TokenMerger(tokens, kept),
        inputs=(features,),
        outputs=(float32(f"merged_{features.name}", features.shape[0], kept, features.shape[2]),),
        cases=projector.cases,
        sample=sample,
        reference=lambda case, inputs: (merge_tokens(inputs[0], kept),),
    )


class TokenMerger(torch.nn.Module):
    """`[images, tokens, hidden]` → `[images, kept, hidden]`; see the module's docstring."""

    def __init__(self, tokens: int, kept: int) -> None:
        super().__init__()
        self.rounds = list(rounds(tokens, kept))

    def forward(self, features: torch.Tensor) -> Tensors:
        sizes = torch.ones_like(features[..., :1])
        for tokens, fewer in self.rounds:
            features, sizes = _round(features, sizes, tokens, fewer)
        return (features,)


def rounds(tokens: int, kept: int) -> Iterator[tuple[int, int]]:
    """How many tokens go into each round and how many of them it takes away."""
    while tokens > kept:
        fewer = min(tokens // 2, tokens - kept)
        yield tokens, fewer
        tokens -= fewer


def _round(x: torch.Tensor, sizes: torch.Tensor, tokens: int, fewer: int) -> Tensors:
    """One round: `x [images, tokens, hidden]`, `sizes [images, tokens, 1]` → both with `fewer` tokens less."""
    even, odd = torch.arange(0, tokens, 2), torch.arange(1, tokens, 2)
    unit = x / (x * x).sum(-1, keepdim=True).add(1e-12).sqrt()
    likeness = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    best, partner = likeness.amax(-1), likeness.argmax(-1)
    # The place of a pair among all pairs, the most alike first, of equals the earlier: sorting without a sort.
    other, own = best[:, None, :], best[:, :, None]
    ahead = (other > own) | ((other == own) & (even[None, :] < even[:, None]))
    merged = ahead.to(torch.int64).sum(-1) < fewer
    # From here on those at even places come first.
    goes_to = torch.cat([torch.where(merged, partner * 2 + 1, even), odd.expand(x.shape[0], -1)], dim=1)
    stays = torch.cat([~merged, torch.ones_like(goes_to[:, : len(odd)], dtype=torch.bool)], dim=1)
    before = torch.cat([even, odd]) < goes_to[:, :, None]
    row = (before & stays[:, None, :]).to(torch.int64).sum(-1)
    shares = (row[:, None, :] == torch.arange(tokens - fewer)[:, None]).to(x.dtype)
    by_parity = [torch.cat([one[:, ::2], one[:, 1::2]], dim=1) for one in (x, sizes)]
    weights = shares * by_parity[1].transpose(1, 2)
    total = weights.sum(-1, keepdim=True)
    return (weights @ by_parity[0]) / total, total


def merge_tokens(features: torch.Tensor, kept: int) -> torch.Tensor:
    """The same as TokenMerger, one image and one pair at a time, as the paper tells it: what the graph is compared with."""
    images = []
    for image in features:
        tokens = [(vector, 1.0) for vector in image]
        while len(tokens) > kept:
            tokens = _merge_pairs(tokens, min(len(tokens) // 2, len(tokens) - kept))
        images.append(torch.stack([vector for vector, _ in tokens]))
    return torch.stack(images)


def _merge_pairs(tokens: list[tuple[torch.Tensor, float]], fewer: int) -> list[tuple[torch.Tensor, float]]:
    unit = torch.nn.functional.normalize(torch.stack([vector for vector, _ in tokens]), dim=-1, eps=1e-6)
    best, partner = (unit[::2] @ unit[1::2].T).max(-1)
    chosen = torch.argsort(best, descending=True, stable=True)[:fewer].tolist()
    groups: dict[int, list[int]] = {place: [place] for place in range(len(tokens))}
    for pair in chosen:
        groups[int(partner[pair]) * 2 + 1] += groups.pop(2 * pair)
    averages = []
    for place in sorted(groups):
        size = sum(tokens[member][1] for member in groups[place])
        total: Any = sum(tokens[member][0] * tokens[member][1] for member in groups[place])
        averages.append((total / size, size))
    return averages


def _mergeable(split: Split) -> GenerativeContract:
    """The contract of a split whose tokens can be merged. Raises UnsupportedModelError, saying why, for any other."""
    contract = split.contract
    why = ""
    if not isinstance(contract, GenerativeContract) or contract.family != "projector":
        why = f"a model of family '{contract.family}' has no row of projected visual tokens in its prompt"
    elif not isinstance(contract.positions, SequentialPositions):
        why = "its positions (M-RoPE) follow the grid of an image's patches"
    elif any(one.kind == "features" for one in contract.token_inputs):
        why = "its decoder adds further features (DeepStack) to each visual token"
    else:
        kinds = [type(one.placeholder) for one in contract.modalities if "projector" in one.graphs]
        odd = next((kind for kind in kinds if kind not in _COUNTS), None)
        if odd is not None:
            why = f"the number and the arrangement of its visual tokens follow an image's size ({odd.__name__})"
    if why:
        raise UnsupportedModelError(f"Visual tokens cannot be merged here: {why}; export without merging.")
    assert isinstance(contract, GenerativeContract)
    return contract


def _merged(modality: Modality, kept: int) -> Modality:
    placeholder = modality.placeholder
    assert placeholder is not None
    fewer = msgspec.structs.replace(placeholder, **{_COUNTS[type(placeholder)]: kept})
    return msgspec.structs.replace(modality, graphs=[*modality.graphs, ROLE], placeholder=fewer)
