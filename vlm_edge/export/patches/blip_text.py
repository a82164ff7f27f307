"""BLIP's text layers (MED, arXiv 2201.12086, section 3.1): self-attention, and cross-attention to the source."""

from __future__ import annotations

from typing import Any

import torch

from vlm_edge.export.attention import attention

from .cached import keys_and_values


def forward(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """BlipTextSelfAttention: `[batch, queries, hidden]` → context of the same shape.

    The layer hands the source's mask to its cross-attention as `attention_mask`; the original drops it there, so that rows of
    one batch with sources of unlike length read each other's padding. Here it counts.
    """

    def heads(projection: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
        return projection(states).view(*states.shape[:-1], -1, self.attention_head_size).transpose(1, 2)

    crossing = encoder_hidden_states is not None
    source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    key, value = keys_and_values(
        past_key_values, self.layer_idx, crossing, lambda: (heads(self.key, source), heads(self.value, source))
    )
    context, _ = attention(self, heads(self.query, hidden_states), key, value, attention_mask, is_causal=False)
    return context.flatten(2), None
