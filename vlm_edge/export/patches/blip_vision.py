"""The attention of BLIP's vision encoder: one product gives query, key and value."""

from __future__ import annotations

from typing import Any

import torch

from vlm_edge.export.attention import attention


def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """BlipAttention: `[batch, patches, hidden]` → the same shape."""
    packed = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
    query, key, value = (packed[:, :, part].transpose(1, 2) for part in range(3))
    context, _ = attention(self, query, key, value, None, scaling=self.scale)
    return self.projection(context.flatten(2)), None
