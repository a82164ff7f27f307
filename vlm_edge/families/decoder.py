"""The two text graphs that several families share: the embedding table, and the decoder with its KV cache.

Not a family: a part that families build from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from vlm_edge.export.attention import PastCache, attention_implementation
from vlm_edge_runtime.bundle.manifest import KVLayout, TensorSpec
from vlm_edge_runtime.errors import UnsupportedModelError

from .base import Case, GraphPlan, Part, Tensors, float32, int64

LONGEST_CHECKED_WINDOW = 2048
"""A sliding window up to this length is checked beyond its edge; wider ones would need gigabytes of random cache."""


class EmbedTokens(torch.nn.Module):
    """`input_ids [batch, sequence]` → `inputs_embeds [batch, sequence, hidden]`.

    The model's own embedding is *run*, not copied: Gemma scales its embeddings inside it.
    """

    def __init__(self, model: Part) -> None:
        super().__init__()
        self.embedding = model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor) -> Tensors:
        return (self.embedding(input_ids),)


Arguments = dict[str, Any]
"""Keyword arguments of the model's call."""
Enter = Callable[[Part, torch.Tensor, Arguments], AbstractContextManager[Any]]
"""Puts a tensor where the model reads it: into the arguments of its call, or around the call."""


def as_argument(name: str) -> Enter:
    """The tensor is the model's keyword argument of that name."""

    def enter(model: Part, value: torch.Tensor, arguments: Arguments) -> AbstractContextManager[Any]:
        arguments[name] = value
        return nullcontext()

    return enter


@dataclass(frozen=True, slots=True)
class ExtraInput:
    """A decoder input besides embeddings, mask, positions and cache: per token (`[batch, sequence, …]`) or static.

    `sample(case)` makes it. `traced` and `original` say how it reaches the model while it is traced and in the reference.
    """

    spec: TensorSpec
    sample: Callable[[Case], torch.Tensor]
    traced: Enter
    original: Enter


class Decoder(torch.nn.Module):
    """One step: embeddings, masks, positions, extra inputs and the whole past → logits and the whole present.

    The full vision-language model is called without an image, so that whatever it does around its text model stays in.
    """

    def __init__(self, model: Part, extras: Sequence[ExtraInput] = ()) -> None:
        super().__init__()
        self.model: Part = model
        self._extras = tuple(extras)

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *rest: torch.Tensor
    ) -> Tensors:
        given, past = rest[: len(self._extras)], rest[len(self._extras) :]
        cache = PastCache(past)
        arguments: Arguments = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": cache,
            "use_cache": True,
            "return_dict": True,
        }
        with ExitStack() as stack:
            for extra, value in zip(self._extras, given, strict=True):
                stack.enter_context(extra.traced(self.model, value, arguments))
            output = self.model(**arguments)
        return (output.logits, *cache.presents())


def probe(model: Part) -> tuple[KVLayout, int, int]:
    """Runs the original model on two tokens and reads its KV layout, hidden size and vocabulary size off the tensors."""
    cache = DynamicCache()
    with torch.no_grad(), attention_implementation(model, "eager"):
        embeddings = model.get_input_embeddings()(torch.zeros(1, 2, dtype=torch.long))
        logits = model(inputs_embeds=embeddings.clone(), past_key_values=cache, use_cache=True, return_dict=True).logits
    shapes = {tuple(tensor.shape) for tensor in _tensors(cache)}
    if len(shapes) != 1:
        raise UnsupportedModelError(f"The decoder's layers keep caches of different shapes ({sorted(shapes)}); one is expected.")
    _, heads, _, width = shapes.pop()
    return KVLayout(layers=len(cache.layers), kv_heads=heads, head_dim=width), embeddings.shape[-1], logits.shape[-1]


def embed_plan(model: Part, hidden: int, vocabulary: int) -> GraphPlan:
    """The graph `embed_tokens`."""
    inputs, outputs = (int64("input_ids", "batch", "sequence"),), (float32("inputs_embeds", "batch", "sequence", hidden),)

    def reference(case: Case, tensors: Tensors) -> Tensors:
        return (model.get_input_embeddings()(tensors[0]),)

    def sample(case: Case) -> Tensors:
        return (_token_ids(model, inputs[0], case, vocabulary),)

    cases = tuple(
        Case(label, {"batch": batch, "sequence": sequence})
        for label, batch, sequence in [("batch 2, 3 tokens", 2, 3), ("batch 1, 1 token", 1, 1), ("batch 3, 7 tokens", 3, 7)]
    )
    return GraphPlan("embed_tokens", EmbedTokens(model), inputs, outputs, cases, sample, reference)


def decoder_plan(
    model: Part,
    kv: KVLayout,
    hidden: int,
    vocabulary: int,
    context_length: int,
    *,
    rotary_axes: int = 1,
    extras: Sequence[ExtraInput] = (),
    sizes: Mapping[str, int] | None = None,
    more_cases: Sequence[Case] = (),
) -> GraphPlan:
    """The graph `decoder`. `rotary_axes` is 3 for M-RoPE, whose position_ids are `[3, batch, sequence]`.

    `extras` come after position_ids, in order; `sizes` gives their own dynamic dimensions, unlike those of the traced case;
    `more_cases` are checked besides the usual ones.
    """
    cache = ("batch", kv.kv_heads)
    names = [f"{layer}.{part}" for layer in range(kv.layers) for part in ("key", "value")]
    axes = () if rotary_axes == 1 else (rotary_axes,)
    inputs = (
        float32("inputs_embeds", "batch", "sequence", hidden),
        int64("attention_mask", "batch", "total"),
        int64("position_ids", *axes, "batch", "sequence"),
        *(extra.spec for extra in extras),
        *(float32(f"past_key_values.{name}", *cache, "past", kv.head_dim) for name in names),
    )
    outputs = (
        float32("logits", "batch", "sequence", vocabulary),
        *(float32(f"present.{name}", *cache, "total", kv.head_dim) for name in names),
    )

    def sample(case: Case) -> Tensors:
        ids = _token_ids(model, int64("input_ids", "batch", "sequence"), case, vocabulary)
        embeddings = model.get_input_embeddings()(ids).detach().clone()
        mask = torch.ones(case.shape(inputs[1]), dtype=torch.long)
        mask[0, : case.padding] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, case.sizes["past"] :]
        if rotary_axes > 1:  # unlike along every axis, as inside an image
            positions = torch.stack([positions + axis for axis in range(rotary_axes)])
        generator = case.generator()
        past = [torch.randn(case.shape(spec), generator=generator) for spec in inputs[3 + len(extras) :]]
        return (embeddings, mask, positions, *(extra.sample(case) for extra in extras), *past)

    def reference(case: Case, tensors: Tensors) -> Tensors:
        embeddings, mask, positions, *rest = tensors
        given, past = rest[: len(extras)], rest[len(extras) :]
        before = DynamicCache()
        if case.sizes["past"]:
            for layer in range(kv.layers):
                before.update(past[2 * layer].clone(), past[2 * layer + 1].clone(), layer)
        arguments: Arguments = {
            "inputs_embeds": embeddings.clone(),  # some models add to it in place
            "attention_mask": mask.clone(),
            "position_ids": positions.clone(),
            "past_key_values": before,
            "use_cache": True,
            "return_dict": True,
        }
        with ExitStack() as stack:
            for extra, value in zip(extras, given, strict=True):
                stack.enter_context(extra.original(model, value.clone(), arguments))
            output = model(**arguments)
        return (output.logits, *_tensors(before))

    def compared(case: Case, tensors: Tensors) -> Tensors | None:
        if not case.padding:
            return None
        real = tensors[1].bool()
        return (real[:, case.sizes["past"] :, None], *([real[:, None, :, None]] * (2 * kv.layers)))

    cases = (*_decoder_cases(context_length, _window(model.config.get_text_config()), sizes or {}), *more_cases)
    return GraphPlan("decoder", Decoder(model, extras), inputs, outputs, cases, sample, reference, compared)


def _decoder_cases(context_length: int, window: int | None, more: Mapping[str, int]) -> tuple[Case, ...]:
    """Prefill and decode, batch 1 and 3, left padding, and a past that is empty, short, and longer than the sliding window."""
    long = 27 if window is None or window > LONGEST_CHECKED_WINDOW else max(27, window + 3)
    long = max(2, min(long, context_length - 6))

    def case(label: str, batch: int, sequence: int, past: int, padding: int = 0) -> Case:
        sizes = {"batch": batch, "sequence": sequence, "past": past, "total": past + sequence, **more}
        return Case(
            f"{label} (batch {batch}, {sequence} tokens, past {past}{f', {padding} padded' if padding else ''})", sizes, padding
        )

    return (
        case("continued prefill", 2, 3, 4),
        case("prefill", 1, 5, 0),
        case("prefill", 3, 5, 0),
        case("prefill", 2, 6, 0, padding=2),
        case("first token", 1, 1, 0),
        case("decode", 1, 1, long),
        case("decode", 3, 1, 4),
        case("decode", 3, 1, long, padding=2),
        case("continued prefill", 2, 4, long, padding=2),
    )


def _tensors(cache: DynamicCache) -> list[torch.Tensor]:
    """Key and value of every layer. Raises UnsupportedModelError for layers that keep something else."""
    found: list[torch.Tensor] = []
    for layer in cache.layers:
        key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
        if key is None or value is None:
            raise UnsupportedModelError(f"A {type(layer).__name__} in the decoder keeps no keys and values.")
        found.extend((key, value))
    return found


def _window(config: Any) -> int | None:
    window = getattr(config, "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else None


def _token_ids(model: Part, spec: TensorSpec, case: Case, vocabulary: int) -> torch.Tensor:
    rows = min(vocabulary, model.get_input_embeddings().weight.shape[0])
    return torch.randint(0, rows, case.shape(spec), generator=case.generator())
