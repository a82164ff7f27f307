"""Writes the precision of every value into the graph, as strongly typed engines want it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from .base import Changes, GraphPass

Half = Literal["fp16", "bf16"]
PRECISION = "vlm_edge.precision"
"""Metadata of a node that must compute in fp32 (`"fp32"`), whatever the islands; a pass that decomposes a normalisation,

a softmax or a rotation may set it on what it writes.
"""
FULL_INPUTS = frozenset({"pixel_values", "audio_features", "flattened_patches", "interpolation_weights", "states"})
"""Float inputs that the host makes: fp32 in every build."""
FULL_OUTPUTS = frozenset({"logits", "image_logits", "pixels", "image_embeds", "text_embeds", "attention"})
"""Float outputs that the host reads: fp32 in every build. All other float inputs and outputs are of the graph's half type."""


@dataclass(slots=True, frozen=True)
class Islands:
    """What stays in fp32 in a half-precision graph besides positions, masks, overflowing weights and fp32 outputs."""

    norms: bool = True
    softmax: bool = True
    """Of decomposed attention and of softmax nodes; a whole `Attention` node is never taken apart."""
    nodes: frozenset[str] = frozenset()
    """Further nodes by name."""


class StrongTypes(GraphPass):
    """fp32 graph → strongly typed fp16 (or bf16) graph with fp32 islands."""

    name: ClassVar[str] = "strong_types"

    def __init__(
        self,
        half: Half = "fp16",
        islands: Islands | None = None,
        *,
        full_inputs: Collection[str] = FULL_INPUTS,
        full_outputs: Collection[str] = FULL_OUTPUTS,
    ) -> None:
        self.half = half
        self.islands = islands if islands is not None else Islands()
        self.full_inputs, self.full_outputs = full_inputs, full_outputs

    def apply(self, model: ir.Model) -> Changes:
        raise NotImplementedError
