"""A decoder that is a recurrent network attending to the image (Show-Attend-Tell, arXiv 1502.03044), as graphs.

Not a family: a part of family `cross_attention`. What the network keeps between tokens is `state.{i}` instead of a KV cache; what
depends on the image alone (the image's side of the attention, the initial state) is the graph `cross_kv`. The decoder's further
output `attention` says where it looked at each token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge_runtime.bundle.manifest import KVLayout
from vlm_edge_runtime.errors import UnsupportedModelError

from .base import Case, GraphPlan, Part, Tensors, float32, randn, sequence_of_cases
from .cross_vision import Vision, vision_plans, whole
from .decoder import embed_plan

NO_CACHE = KVLayout(layers=0, kv_heads=1, head_dim=1)
"""A decoder without self-attention keeps no keys and values."""
_NEEDED = ("begin", "attend_image")


@dataclass(frozen=True, slots=True)
class Recurrent:
    """The graphs in order, those of the image, the decoder's width and vocabulary, and the width of what it attends to."""

    plans: tuple[GraphPlan, ...]
    vision: Vision
    hidden: int
    vocabulary: int


def recurrent_plans(checkpoint: Checkpoint, vision: Part, decoder: Part) -> Recurrent:
    """All graphs of a model whose `decoder` is recurrent.

    `decoder(embeddings, features, keys, states)` gives logits, attention and states; `begin(features)` the first states,
    `attend_image(features)` the keys. Raises UnsupportedModelError for a decoder of another kind.
    """
    model: Part = checkpoint.model
    if missing := [name for name in _NEEDED if not hasattr(decoder, name)]:
        raise UnsupportedModelError(
            f"The decoder {type(decoder).__name__} has no {missing[0]}(): a recurrent decoder gives its first state and the "
            "image's side of its attention by begin() and attend_image()."
        )
    seen = vision_plans(checkpoint, whole, _Places(vision, model.config), None)
    with torch.no_grad():
        features = torch.zeros(1, seen.tokens, seen.width)
        states, keys = decoder.begin(features), decoder.attend_image(features)
        embedded = model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long))
        vocabulary = int(decoder(embedded, features, keys, states)[0].shape[-1])
    sizes = _Sizes(int(embedded.shape[-1]), vocabulary, seen.width, int(keys.shape[-1]), [int(one.shape[-1]) for one in states])
    plans = (
        *seen.plans,
        _cross_kv(decoder, sizes),
        embed_plan(model, sizes.hidden, vocabulary),
        _decoder(decoder, sizes),
    )
    return Recurrent(plans, seen, sizes.hidden, vocabulary)


@dataclass(frozen=True, slots=True)
class _Sizes:
    hidden: int
    vocabulary: int
    width: int
    keys: int
    states: list[int]


class _Places(torch.nn.Module):
    """A bare network that gives `[images, places, width]`, called as transformers' encoders are."""

    def __init__(self, vision: torch.nn.Module, config: PreTrainedConfig) -> None:
        super().__init__()
        self.vision = vision
        self.config = config

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.vision(pixel_values))


class _CrossKV(torch.nn.Module):
    """`encoder_hidden_states [batch, source, width]` → `attention_keys [batch, source, attention]` and the first states."""

    def __init__(self, decoder: Part) -> None:
        super().__init__()
        self.decoder: Part = decoder

    def forward(self, encoder_hidden_states: torch.Tensor) -> Tensors:
        return (self.decoder.attend_image(encoder_hidden_states), *self.decoder.begin(encoder_hidden_states))


def _cross_kv(decoder: Part, sizes: _Sizes) -> GraphPlan:
    features = float32("encoder_hidden_states", "batch", "source", sizes.width)
    outputs = (
        float32("attention_keys", "batch", "source", sizes.keys),
        *(float32(f"state.{i}", "batch", width) for i, width in enumerate(sizes.states)),
    )

    def reference(case: Case, inputs: Tensors) -> Tensors:
        return (decoder.attend_image(inputs[0].clone()), *decoder.begin(inputs[0].clone()))

    cases = sequence_of_cases(("batch", "source"), ("batch 2, 5 places", 2, 5), ("batch 1, 1 place", 1, 1), ("batch 3", 3, 9))
    return GraphPlan("cross_kv", _CrossKV(decoder), (features,), outputs, cases, lambda case: (randn(features, case),), reference)


class _Step(torch.nn.Module):
    """One call of the decoder; the tokens' own loop is inside the graph."""

    def __init__(self, decoder: Part) -> None:
        super().__init__()
        self.decoder: Part = decoder

    def forward(self, inputs_embeds: torch.Tensor, features: torch.Tensor, keys: torch.Tensor, *states: torch.Tensor) -> Tensors:
        logits, attention, after = self.decoder(inputs_embeds, features, keys, states)
        return (logits, attention, *after)


def _decoder(decoder: Part, sizes: _Sizes) -> GraphPlan:
    """The graph `decoder`: embeddings, image and states → logits, `attention [batch, sequence, source]`, the new states."""
    inputs = (
        float32("inputs_embeds", "batch", "sequence", sizes.hidden),
        float32("encoder_hidden_states", "batch", "source", sizes.width),
        float32("attention_keys", "batch", "source", sizes.keys),
        *(float32(f"state.{i}", "batch", width) for i, width in enumerate(sizes.states)),
    )
    outputs = (
        float32("logits", "batch", "sequence", sizes.vocabulary),
        float32("attention", "batch", "sequence", "source"),
        *(float32(f"present_state.{i}", "batch", width) for i, width in enumerate(sizes.states)),
    )

    def sample(case: Case) -> Tensors:
        generator = case.generator()
        return tuple(torch.randn(case.shape(spec), generator=generator) for spec in inputs)

    def reference(case: Case, tensors: Tensors) -> Tensors:
        embeddings, features, keys, *states = (tensor.clone() for tensor in tensors)
        logits, attention, after = decoder(embeddings, features, keys, tuple(states))
        return (logits, attention, *after)

    cases = sequence_of_cases(
        ("batch", "sequence", "source"),
        ("batch 2, 3 tokens, 5 places", 2, 3, 5),
        ("first token", 1, 1, 6),
        ("batch 1, 7 tokens", 1, 7, 9),
        ("batch 3, 1 token", 3, 1, 6),
        ("batch 3, 4 tokens, 1 place", 3, 4, 1),
    )
    return GraphPlan("decoder", _Step(decoder), inputs, outputs, cases, sample, reference)
