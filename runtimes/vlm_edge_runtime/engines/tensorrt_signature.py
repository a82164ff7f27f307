"""What a compiled decoder reads and gives, told apart by names and dimensions.

The decoder of a TensorRT build takes `inputs_embeds` [batch, sequence, hidden], optionally `position_ids` [batch, sequence] or
[3, batch, sequence] and `past_lengths` int32 [batch] (valid entries of each row before the step, which is where its first new
entry is written), and for each cache tensor `past_key_values.*` [batch, kv_heads, capacity, width]; it gives `logits` float32
[batch, 1, vocab] of the last token and `present.*`. Further inputs are those of the portable decoder (see `DecoderInputs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from vlm_edge_runtime.bundle.manifest import TensorSpec
from vlm_edge_runtime.errors import DeviceError

from .decoder_inputs import PAST, STATE, DecoderInputs
from .tensorrt_program import Program

PAST_LENGTHS = "past_lengths"
_OWN = {"inputs_embeds", "position_ids", PAST_LENGTHS}


@dataclass(slots=True, frozen=True)
class CacheSpec:
    """One cache tensor: [batch, heads, capacity, entry bytes]."""

    past: str
    present: str
    heads: int
    entry: int


@dataclass(slots=True, frozen=True)
class Signature:
    """`capacity`: entries of the caches, None without any. `in_place`: past and present are one memory; else they take turns."""

    hidden: int
    vocab: int
    axes: int
    capacity: int | None
    in_place: bool
    caches: tuple[CacheSpec, ...]
    inputs: DecoderInputs
    states: Mapping[str, str]
    """Recurrent input → the output that follows it."""
    further: tuple[TensorSpec, ...]
    specs: Mapping[str, TensorSpec]
    types: Mapping[str, str]
    """The engine's type of each tensor."""
    counts_last: bool = False
    """`past_lengths` is the index of the newest entry instead of the number of entries before the run (alike for one token)."""


def read_signature(program: Program, specs: Sequence[TensorSpec], portable: Sequence[TensorSpec]) -> Signature:
    """The signature of a compiled decoder. `specs`: its graph's inputs and outputs; `portable`: those of the portable decoder,

    whose types the callers use. Raises DeviceError for a graph that is not a decoder of the form above.
    """
    named = {spec.name: spec for spec in specs}
    types = {name: info.dtype for name, info in program.tensors.items()}
    if missing := types.keys() - named.keys():
        raise DeviceError(f"the decoder's engine has tensors that its graph does not have ({_list(missing)}): build it again.")
    callers = {spec.name: spec.dtype for spec in portable}
    inputs = [name for name, info in program.tensors.items() if info.is_input]
    outputs = [name for name, info in program.tensors.items() if not info.is_input]
    if "inputs_embeds" not in inputs or "logits" not in outputs:
        raise DeviceError(f"the engine of graph 'decoder' takes {_list(inputs)} and gives {_list(outputs)}: that is no decoder.")
    hidden, logits = named["inputs_embeds"].shape[-1], named["logits"].shape
    vocab = logits[-1]
    if (
        not isinstance(hidden, int)
        or not isinstance(vocab, int)
        or len(logits) != 3
        or logits[1] != 1
        or types["logits"] != "float32"
    ):
        raise DeviceError(
            f"the decoder's engine gives logits {types['logits']} {list(logits)} for embeddings "
            f"{list(named['inputs_embeds'].shape)}; expected are float32 [batch, 1, vocabulary] and a fixed hidden size: build "
            "it again."
        )
    caches = tuple(_cache(name, named, types, outputs) for name in inputs if name.startswith(PAST))
    capacities = {named[cache.past].shape[2] for cache in caches}
    if len(capacities) > 1 or any(not isinstance(size, int) for size in capacities):
        raise DeviceError(
            f"the decoder's engine has caches of {_list(map(str, capacities))} entries; expected is one fixed number."
        )
    capacity = next((size for size in capacities if isinstance(size, int)), None)
    if caches and PAST_LENGTHS not in inputs:
        raise DeviceError(f"the decoder's engine keeps a cache and takes no '{PAST_LENGTHS}': build it again.")
    further_inputs = [
        msgspec.structs.replace(named[name], dtype=callers.get(name, types[name]))
        for name in inputs
        if name not in _OWN and not name.startswith(PAST)
    ]
    states = {name: f"present_{name}" for name in inputs if name.startswith(STATE)}
    if lost := [name for name in states.values() if name not in outputs]:
        raise DeviceError(f"the decoder's engine gives no {_list(lost)}, which its recurrent state becomes: build it again.")
    following = {cache.present for cache in caches} | set(states.values()) | {"logits"}
    positions = named.get("position_ids") if "position_ids" in inputs else None
    aliased = [program.alias(cache.present) == cache.past for cache in caches]
    if any(aliased) and not all(aliased):
        raise DeviceError("the decoder's engine updates some of its caches in place and others not: build it again.")
    return Signature(
        hidden=hidden,
        vocab=vocab,
        axes=0 if positions is None else 1 if len(positions.shape) == 2 else int(positions.shape[0]),
        capacity=capacity,
        in_place=all(aliased),
        caches=caches,
        inputs=DecoderInputs("decoder", further_inputs),
        states=states,
        further=tuple(named[name] for name in outputs if name not in following),
        specs=named,
        types=types,
        counts_last=bool(getattr(program, "counts_last", False)),
    )


def _cache(name: str, specs: Mapping[str, TensorSpec], types: Mapping[str, str], outputs: Sequence[str]) -> CacheSpec:
    present, shape = f"present.{name.removeprefix(PAST)}", specs[name].shape
    if present not in outputs or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        raise DeviceError(
            f"the decoder's cache '{name}' {list(shape)} has no '{present}', or is not [batch, heads, capacity, width]."
        )
    return CacheSpec(name, present, shape[1], shape[3] * np.dtype(types[name]).itemsize)


def _list(names: object) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))  # type: ignore[call-overload]
