"""TrOCR's decoder attention: to itself over its cache, or to the source, whose width may be another (arXiv 2109.10282)."""

from __future__ import annotations

from typing import Any

import torch

from vlm_edge.export.attention import attention

from .cached import keys_and_values


def forward(
    self: Any,
    hidden_states: torch.Tensor,
    key_value_states: torch.Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """TrOCRAttention: `[batch, queries, hidden]` → the same shape."""

    def heads(projection: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
        return projection(states).view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    crossing = key_value_states is not None
    source = hidden_states if key_value_states is None else key_value_states
    key, value = keys_and_values(
        past_key_values, self.layer_idx, crossing, lambda: (heads(self.k_proj, source), heads(self.v_proj, source))
    )
    context, _ = attention(
        self, heads(self.q_proj, hidden_states), key, value, attention_mask, scaling=self.scaling, is_causal=False
    )
    return self.out_proj(context.flatten(2)), None
