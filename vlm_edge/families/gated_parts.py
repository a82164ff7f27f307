"""What the kinds of gated cross-attention have in common: the graphs they come as. A part of family `gated_cross_attention`."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_edge_runtime.bundle.manifest import KVLayout

from .base import GraphPlan

MASK = "cross_attention_mask"
"""The decoder's input that says which images a token sees: int64 `[batch, sequence, images]` or `[…, images, tiles]`."""


@dataclass(frozen=True, slots=True)
class Gated:
    """A checkpoint in graphs: those that make an image's vectors, in order, then `cross_kv` and `decoder`.

    `source_width`: width of the vectors that cross-attention reads; `entries_per_image`: how many of them an image becomes.
    """

    features: tuple[GraphPlan, ...]
    cross_kv: GraphPlan
    decoder: GraphPlan
    kv: KVLayout
    hidden: int
    vocabulary: int
    source_width: int
    entries_per_image: int
