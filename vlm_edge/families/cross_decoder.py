"""The text graphs of a decoder that reads an encoder: `encoder`, `cross_kv`, `decoder` with static keys and values.

Not a family: a part that families build from. Cross-attention's keys and values depend on the source alone, so they are computed
once, by a graph of their own, and every step of the decoder reads them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from vlm_edge.export.checkpoint import Checkpoint

from .base import Case, GraphPlan, Part, Tensors, float32, int64
from .cross_step import CrossDecoder, Sizes
from .decoder import Arguments, ExtraInput, as_argument, decoder_plan

__all__ = ["CrossDecoder", "Sizes", "cross_decoder_plan", "cross_kv_plan", "encoder_plan"]

_SOURCES = (5, 6, 1, 9)
"""Lengths of the source over the cases of a plan, in turn; the first is the traced one."""

_SAMPLED_TOKENS = 64
"""Tokens that an encoder is checked on are drawn from the first so many."""


def cross_decoder_plan(
    decoder: CrossDecoder, context_length: int, *, masked: bool, extras: Sequence[ExtraInput] = ()
) -> GraphPlan:
    """The graph `decoder`: self-attention over a growing cache, cross-attention over the static inputs `cross_key_values.*`.

    `masked`: rows may have sources of unlike length; then the input `encoder_attention_mask` int64 `[batch, source]` says what is
    real. `extras`: further inputs of the decoder, after these.
    """
    sizes, more = decoder.sizes, list[ExtraInput]()
    if masked:
        spec = int64("encoder_attention_mask", "batch", "source")
        more.append(ExtraInput(spec, _source_mask, as_argument(spec.name), as_argument(spec.name)))
    for number, name in enumerate(sizes.cross_names):
        more.append(_static(name, number, sizes))
    plan = decoder_plan(
        decoder, sizes.kv, sizes.hidden, sizes.vocabulary, context_length, extras=[*more, *extras], sizes={"source": _SOURCES[0]}
    )
    lengths = (_SOURCES[i % len(_SOURCES)] for i in range(len(plan.cases)))
    cases = tuple(
        replace(case, label=f"{case.label}, source {source}", sizes={**case.sizes, "source": source})
        for case, source in zip(plan.cases, lengths, strict=True)
    )
    return replace(plan, cases=cases)


def _static(name: str, number: int, sizes: Sizes) -> ExtraInput:
    spec = float32(name, "batch", sizes.cross_heads, "source", sizes.cross_head_dim)

    def sample(case: Case) -> torch.Tensor:
        generator = case.generator().manual_seed(case.generator().initial_seed() + number + 1)
        return torch.randn(case.shape(spec), generator=generator)

    return ExtraInput(spec, sample, as_argument(name), as_argument(name))


def _source_mask(case: Case) -> torch.Tensor:
    """All real, but for the end of the first of several rows."""
    mask = torch.ones(case.sizes["batch"], case.sizes["source"], dtype=torch.long)
    if case.sizes["batch"] > 1:
        mask[0, max(1, case.sizes["source"] - 2) :] = 0
    return mask


class _CrossKV(torch.nn.Module):
    def __init__(self, decoder: CrossDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, encoder_hidden_states: torch.Tensor) -> Tensors:
        return tuple(self.decoder.fill(encoder_hidden_states))


def cross_kv_plan(decoder: CrossDecoder) -> GraphPlan:
    """The graph `cross_kv`: `encoder_hidden_states [batch, source, width]` → `cross_key_values.{i}.key/.value`."""
    sizes = decoder.sizes
    states = float32("encoder_hidden_states", "batch", "source", decoder.width)
    outputs = tuple(float32(name, "batch", sizes.cross_heads, "source", sizes.cross_head_dim) for name in sizes.cross_names)
    return GraphPlan(
        role="cross_kv",
        module=_CrossKV(decoder),
        inputs=(states,),
        outputs=outputs,
        cases=_source_cases(padded=False),
        sample=lambda case: (torch.randn(case.shape(states), generator=case.generator()),),
        reference=lambda case, inputs: tuple(decoder.fill(inputs[0].clone())),
    )


class _Encoder(torch.nn.Module):
    def __init__(self, encoder: Part, first: str, extras: Sequence[ExtraInput]) -> None:
        super().__init__()
        self.encoder: Part = encoder
        self._first = first
        self._extras = tuple(extras)

    def forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor, *given: torch.Tensor) -> Tensors:
        arguments: Arguments = {self._first: tokens, "attention_mask": attention_mask, "return_dict": True}
        with ExitStack() as stack:
            for extra, value in zip(self._extras, given, strict=True):
                stack.enter_context(extra.traced(self.encoder, value, arguments))
            return (self.encoder(**arguments).last_hidden_state,)


def encoder_plan(
    encoder: Part,
    embedding: Callable[[torch.Tensor], torch.Tensor],
    hidden: int,
    width: int,
    *,
    extras: Sequence[ExtraInput] = (),
    more: Mapping[str, int] | None = None,
    by_ids: bool = False,
) -> GraphPlan:
    """The graph `encoder`: `inputs_embeds [batch, source, hidden]` and `attention_mask` → `encoder_hidden_states`, `width` wide.

    `embedding` gives the embeddings of token ids (what is checked is what the model would see); `extras` are further inputs of
    the encoder, `more` the dimensions that are theirs. `by_ids`: an encoder that embeds tokens in another way than the decoder
    takes `input_ids` int64 `[batch, source]` first.
    """
    first = int64("input_ids", "batch", "source") if by_ids else float32("inputs_embeds", "batch", "source", hidden)
    inputs = (first, int64("attention_mask", "batch", "source"), *(extra.spec for extra in extras))

    def sample(case: Case) -> Tensors:
        ids = torch.randint(0, _SAMPLED_TOKENS, (case.sizes["batch"], case.sizes["source"]), generator=case.generator())
        mask = torch.ones_like(ids)
        if case.padding:
            mask[0, -case.padding :] = 0
        return (ids if by_ids else embedding(ids).detach().clone(), mask, *(extra.sample(case) for extra in extras))

    def reference(case: Case, tensors: Tensors) -> Tensors:
        tokens, mask, *given = tensors
        arguments: Arguments = {first.name: tokens.clone(), "attention_mask": mask.clone(), "return_dict": True}
        with ExitStack() as stack:
            for extra, value in zip(extras, given, strict=True):
                stack.enter_context(extra.original(encoder, value.clone(), arguments))
            return (encoder(**arguments).last_hidden_state,)

    return GraphPlan(
        role="encoder",
        module=_Encoder(encoder, first.name, extras),
        inputs=inputs,
        outputs=(float32("encoder_hidden_states", "batch", "source", width),),
        cases=_source_cases(padded=True, **(more or {})),
        sample=sample,
        reference=reference,
        compared=lambda case, inputs: (inputs[1].bool()[..., None],) if case.padding else None,
    )


def _source_cases(*, padded: bool, **more: int) -> tuple[Case, ...]:
    """Batch 1 to 3, one token and several, and a source that is padded at its end."""
    rows = [(2, 5, 0), (1, 1, 0), (3, 9, 0), *([(3, 9, 4)] if padded else [])]
    return tuple(
        Case(f"batch {batch}, source {source}{f', {end} padded' if end else ''}", {"batch": batch, "source": source, **more}, end)
        for batch, source, end in rows
    )


_CONTEXT = 512
"""Longest text of a decoder that has no table of positions and whose tokenizer names no limit: what T5 was trained on."""


def positions_table(config: Any) -> int | None:
    """How long a text model's table of positions is; None where its positions are relative."""
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 1 else None


def longest_text(config: Any, checkpoint: Checkpoint) -> int:
    """How many tokens a text model takes: its table of positions, else its tokenizer's limit."""
    limit = positions_table(config) or int(min(getattr(checkpoint.tokenizer, "model_max_length", _CONTEXT), 1 << 20))
    return limit if limit < 1 << 20 else _CONTEXT
