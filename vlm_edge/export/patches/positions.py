"""Positions given as an input, for models that count them from the length of their cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, cast

import torch


def position_offset(model: torch.nn.Module) -> int:
    """RoBERTa and its kin number positions from `padding_idx + 1` on; all others from 0."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids") and hasattr(module, "position_embeddings"):
            return int(cast(int, module.padding_idx)) + 1
    return 0


def counts_ids(model: torch.nn.Module) -> bool:
    """Whether a model finds positions from token ids alone: on embeddings it fails unless they are given (TrOCR's sines).

    Such a table is neither parameter nor buffer, and from_pretrained leaves it without numbers; it gets them here.
    """
    found = False
    for module in model.modules():
        known = inspect.signature(module.forward).parameters
        sines = type(module).__name__.endswith("SinusoidalPositionalEmbedding")
        if sines and "input_ids" in known and not {"inputs_embeds", "position_ids"} & set(known):
            found, each = True, cast(Any, module)
            if each.weights.is_meta:
                each.weights = each.get_embedding(each.weights.shape[0], each.embedding_dim, each.padding_idx)
    return found


@contextmanager
def positions(model: torch.nn.Module, position_ids: torch.Tensor, attention_mask: torch.Tensor) -> Iterator[None]:
    """Inside, what would count positions from the cache's length uses those given: `[batch, sequence]`, from 0 for every row.

    Learned positions are looked up by them; a relative bias (T5) is that of each key's number among the row's real tokens.
    """
    changed: list[tuple[torch.nn.Module, str, Any]] = []

    def looked_up(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.nn.functional.embedding(position_ids + getattr(module, "offset", 0), module.weight)

    def computed(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.nn.functional.embedding(position_ids + module.padding_idx + 1, module.weights)

    def bias(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        keys = attention_mask.cumsum(-1) - 1
        relative = keys[:, None, :] - position_ids[:, :, None]
        known = inspect.signature(module._relative_position_bucket).parameters
        more = {
            "bidirectional": False,
            "num_buckets": module.relative_attention_num_buckets,
            "max_distance": module.relative_attention_max_distance,
        }
        buckets = module._relative_position_bucket(relative, **{name: more[name] for name in known if name in more})
        return module.relative_attention_bias(buckets).permute(0, 3, 1, 2)

    for module in model.modules():
        replaced: tuple[str, Any] | None = None
        if getattr(module, "has_relative_attention_bias", False):
            replaced = ("compute_bias", bias)
        elif type(module).__name__.endswith("PositionalEmbedding"):
            replaced = ("forward", looked_up if isinstance(module, torch.nn.Embedding) else computed)
        if replaced is not None:
            changed.append((module, replaced[0], module.__dict__.get(replaced[0])))
            setattr(module, replaced[0], MethodType(replaced[1], module))
    try:
        yield
    finally:
        for module, name, before in changed:
            delattr(module, name) if before is None else setattr(module, name, before)
