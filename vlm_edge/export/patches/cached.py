"""Keys and values through whatever cache a model was given, as transformers' own layers take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import EncoderDecoderCache

KeyValue = tuple[torch.Tensor, torch.Tensor]


def keys_and_values(cache: Any, layer: int, crossing: bool, compute: Callable[[], KeyValue]) -> KeyValue:
    """What a layer attends to, `[batch, heads, keys, head_dim]`: read from the cache, or computed and added to it.

    `crossing`: the layer attends to a source, whose keys are computed once and then read.
    """
    if isinstance(cache, EncoderDecoderCache):
        marks = cache.is_updated
        cache = cache.cross_attention_cache if crossing else cache.self_attention_cache
        if crossing:
            if marks.get(layer):
                return cache.layers[layer].keys, cache.layers[layer].values
            marks[layer] = True
    key, value = compute()
    if cache is not None:
        key, value = cache.update(key, value, layer)
    return key, value
