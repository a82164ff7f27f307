"""The original with its visual tokens merged, for bundles that were exported so: what their answers are compared with.

Such a bundle differs from its checkpoint by design. Whether its graphs and the runtime do what they should is shown against
PyTorch with the same merge between the model's projector and its decoder; what the merge costs is a matter of task accuracy
(benchmarks/token_merging.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vlm_edge.families.token_merging import ROLE, merge_tokens
from vlm_edge_runtime.bundle.manifest import Manifest


def merged_counts(manifest: Manifest) -> tuple[int, int] | None:
    """(tokens, tokens that are left) of an image or tile, where the bundle merges them."""
    graph = manifest.graphs.get(ROLE)
    if graph is None:
        return None
    tokens, kept = (int(specs[0].shape[1]) for specs in (graph.inputs, graph.outputs))
    return tokens, kept


@dataclass(frozen=True, slots=True)
class MergedTokens:
    """`projector`: the part of the model whose `tokens` rows for an image or tile become `kept`.

    `token_id`: what stands for each of them in the prompt.
    """

    projector: torch.nn.Module
    token_id: int
    tokens: int
    kept: int

    def inputs(self, made: dict[str, Any]) -> dict[str, Any]:
        """A processor's inputs of one prompt with so many places less for each image or tile."""
        ids = made["input_ids"][0].tolist()
        places, run = [], 0
        for place, token in enumerate(ids):
            if token != self.token_id:
                places.append(place)
                continue
            if run % self.tokens < self.kept:
                places.append(place)
            run += 1
        chosen = torch.tensor(places)
        return {
            name: value[:, chosen] if isinstance(value, torch.Tensor) and value.shape == made["input_ids"].shape else value
            for name, value in made.items()
        }

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model's own projector gives merged tokens."""

        def merge(module: torch.nn.Module, given: Any, features: torch.Tensor) -> torch.Tensor:
            return merge_tokens(features, self.kept)

        handle = self.projector.register_forward_hook(merge)
        try:
            yield
        finally:
            handle.remove()
