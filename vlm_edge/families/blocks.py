"""The decoder input `block_ids`: tokens that see each other in both directions. A part of the families that need it.

A prefix language model (PaliGemma, arXiv 2407.07726; GIT, arXiv 2205.14100) reads its prefix in both directions and writes
causally after it; in Gemma 3 (arXiv 2503.19786) the tokens of one image see each other. `block_ids` int64 `[batch, sequence]`
numbers such blocks among the new tokens from 1; 0 is a causal token. Entries of the cache have no block any more and are seen
causally.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from vlm_edge.export.attention import blocks

from .base import Case, Part, int64
from .decoder import Arguments, ExtraInput

NAME = "block_ids"
LONGEST_CHECKED = 64
"""A sliding window up to this length is checked with a block that is longer; wider ones would need very long prompts."""

_TYPES = {"images": lambda ids: (ids > 0).long(), "prompt": lambda ids: (ids == 0).long()}
"""Block ids as the model's own `token_type_ids`: Gemma 3 marks image tokens by 1, PaliGemma the prefix by 0."""


def block_input(model: Part, kind: str) -> ExtraInput:
    """`block_ids` for a model that has `create_masks_for_generate` and `token_type_ids` of its own.

    `kind`: `images` (each image is a block; a causal token stands between two) or `prompt` (one block per row). The reference
    gets the masks that the model's own method draws over past and new tokens from its own token types.
    """
    windowed = _windowed(model, kind)

    def traced(model: Part, block_ids: torch.Tensor, arguments: Arguments) -> AbstractContextManager[Any]:
        return blocks(block_ids, windowed=windowed)

    @contextmanager
    def original(model: Part, block_ids: torch.Tensor, arguments: Arguments) -> Iterator[None]:
        past = arguments["attention_mask"].shape[1] - block_ids.shape[1]
        types = _TYPES[kind](torch.nn.functional.pad(block_ids, (past, 0)))
        if not past:
            arguments["token_type_ids"] = types
            yield
            return
        masks = model.create_masks_for_generate(
            config=model.config,
            inputs_embeds=arguments["inputs_embeds"],
            attention_mask=arguments["attention_mask"],
            past_key_values=arguments["past_key_values"],
            position_ids=arguments["position_ids"],
            token_type_ids=types,
        )

        def hand_over(module: torch.nn.Module, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return given, {**named, "attention_mask": masks}

        handle = model.get_decoder().register_forward_pre_hook(hand_over, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    spec = int64(NAME, "batch", "sequence")
    return ExtraInput(spec, lambda case: sample(case, kind), traced, original)


def sample(case: Case, kind: str) -> torch.Tensor:
    """Block ids of a case: rows differ; one token is a causal one, as while decoding.

    `images`: row 0 has as many blocks of two as fit, row 1 one long block and nothing before it, row 2 none. `prompt`: the first
    row is one block whole, others end causally after their block.
    """
    ids = torch.zeros(case.sizes["batch"], case.sizes["sequence"], dtype=torch.long)
    tokens = ids.shape[1]
    for row in range(ids.shape[0] if tokens > 1 else 0):
        if kind == "prompt":
            ids[row, : tokens - row] = 1
        elif row == 0:
            position = torch.arange(tokens)
            ids[row] = torch.where(position % 3 < 2, position // 3 + 1, 0)
        elif row == 1:
            ids[row, : tokens - 1] = 1
    return ids


def block_cases(text_config: Any) -> tuple[Case, ...]:
    """Cases besides the decoder's own: a block longer than the sliding window, alone and after a past."""
    window = getattr(text_config, "sliding_window", None)
    long = window + 4 if window is not None and window <= LONGEST_CHECKED else 12
    sizes = [{"batch": 2, "sequence": long, "past": past, "total": past + long} for past in (0, 5)]
    return tuple(Case(f"blocks (batch 2, {long} tokens, past {one['past']})", one, padding=2 * i) for i, one in enumerate(sizes))


def _windowed(model: Part, kind: str) -> bool:
    """Whether a sliding window limits a block too: the model's own masks at a window of 1 token tell."""
    config = copy.copy(model.config.get_text_config())
    if not isinstance(getattr(config, "sliding_window", None), int):
        return False
    config.sliding_window, config._attn_implementation_internal = 1, "eager"
    masks = model.create_masks_for_generate(
        config=config,
        inputs_embeds=torch.zeros(1, 2, 1),
        attention_mask=torch.ones(1, 2, dtype=torch.long),
        past_key_values=None,
        position_ids=torch.arange(2)[None],
        token_type_ids=_TYPES[kind](torch.ones(1, 2, dtype=torch.long)),
    )
    sliding = masks["sliding_attention"] if isinstance(masks, dict) else masks
    return bool(sliding[0, 0, 1, 0] < 0)
