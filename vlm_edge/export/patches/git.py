"""GIT's decoder computes its attention by hand; inside this context it goes through the traced attention like any other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.models.git.modeling_git import GitSelfAttention

from vlm_edge.export.attention import attention


def _forward(
    self: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, past_key_values: Any = None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    rows = hidden_states.shape[:-1]
    query, key, value = (
        part(hidden_states).view(*rows, -1, self.attention_head_size).transpose(1, 2)
        for part in (self.query, self.key, self.value)
    )
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    output, _ = attention(self, query, key, value, attention_mask)
    return output.reshape(*rows, self.all_head_size), None


@contextmanager
def git_attention() -> Iterator[None]:
    """Exchanges the forward of transformers' `GitSelfAttention` for one with the same mathematics."""
    before = GitSelfAttention.forward
    GitSelfAttention.forward = _forward
    try:
        yield
    finally:
        GitSelfAttention.forward = before
