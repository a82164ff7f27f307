"""BLIP's text layers (MED, arXiv 2201.12086, section 3.1): self-attention and, in the decoder, cross-attention to the source."""

from __future__ import annotations

from typing import Any

import torch
from transformers import EncoderDecoderCache

from vlm_edge.export.attention import attention


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

    The layer hands the source's mask to its cross-attention as `attention_mask`; the original drops it there.
    """

    def heads(projection: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
        return projection(states).view(*states.shape[:-1], -1, self.attention_head_size).transpose(1, 2)

    crossing = encoder_hidden_states is not None
    source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    cache, read = past_key_values, False
    if isinstance(cache, EncoderDecoderCache):
        read = crossing and bool(cache.is_updated.get(self.layer_idx))
        marks = cache.is_updated
        cache = cache.cross_attention_cache if crossing else cache.self_attention_cache
        if crossing:
            marks[self.layer_idx] = True
    if read:
        key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
    else:
        key, value = heads(self.key, source), heads(self.value, source)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
    context, _ = attention(self, heads(self.query, hidden_states), key, value, attention_mask, is_causal=False)
    return context.reshape(*hidden_states.shape[:-1], -1), None
