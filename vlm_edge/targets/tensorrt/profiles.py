"""Which sizes an engine is compiled for: a range for every named dimension, one or two optimisation profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from vlm_edge_runtime.bundle.engine_profile import EngineProfile, ShapeRange
from vlm_edge_runtime.bundle.manifest import GenerativeContract, GraphEntry, Modality, TensorSpec
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.errors import TargetError

Range = tuple[int, int, int]
"""Smallest, the one that kernels are chosen for, largest."""

CHUNK = 1024
"""Tokens of one prefill call at most: a longer prompt is read in chunks."""
_IMAGES = 4
_TILES = 17
"""Idefics3 cuts a picture into 4 × 4 tiles at most, and adds the whole."""
_PATCHES = 4096
_ROWS = 16
"""Frames of a video, texts compared at once."""
_STEPS = 1024
_LEAST_ROWS = 2
"""Rows that both profiles of a decoder allow at least.

With a profile of exactly one row and one token TensorRT-RTX 1.7.1 lays the weights out anew for it, and the engine holds them
twice: SmolLM2-135M's decoder at fp16 is 489 MB so, 346 MB where only decode allows several rows, 284 MB where both do, and 277 MB
with one profile (4-bit: 143, 238, 145 and 130 MB).
"""
_TWICE, _SPARE = 1.5, 32 * 10**6
"""An engine of two profiles that is larger than this many times its weights, and so many bytes, holds them twice."""


def buckets(contract: GenerativeContract, wanted: Sequence[int]) -> list[int]:
    """Cache sizes to compile a decoder for: those wanted, none above what the model can attend to.

    Raises TargetError where none is wanted.
    """
    if not wanted or min(wanted) < 1:
        raise TargetError(f"context {list(wanted)}: name at least one number of tokens, each at least 1.")
    return sorted({min(size, contract.context_length) for size in wanted})


def chunk(contract: GenerativeContract, capacity: int | None) -> int:
    """Tokens of one prefill call at most. A prompt whose tokens see each other in both directions is read in one call."""
    most = min(capacity or contract.context_length, contract.context_length)
    whole = any(one.kind == "blocks" and one.blocks in ("prompt", "prefix") for one in contract.token_inputs)
    return most if whole else min(most, max(CHUNK, _block(contract)))


def decoder_profiles(
    bundle: Bundle, entry: GraphEntry, *, capacity: int | None, max_batch: int, number: Literal["one", "two"]
) -> list[EngineProfile]:
    """A decoder's profiles. Two: decode (rows of one token) and prefill (up to a chunk of tokens), each with kernels of its own,

    in this order, so that the first that takes a step's sizes is the one for it. One: both together.
    """
    contract = _generative(bundle)
    most = chunk(contract, capacity)
    sizes = _memory_sizes(bundle, contract)
    if number == "one":
        return [_profile("any", entry.inputs, sizes | {"batch": (1, 1, max_batch), "sequence": (1, 1, most)})]
    rows = (1, 1, max(max_batch, _LEAST_ROWS))
    decode = sizes | {"batch": rows, "sequence": (1, 1, 1)}
    prefill = sizes | {"batch": rows, "sequence": (1, min(most, 512), most)}
    return [_profile("decode", entry.inputs, decode), _profile("prefill", entry.inputs, prefill)]


def holds_weights_twice(engine_bytes: int, weights_bytes: int) -> bool:
    """Whether an engine of two profiles has stored the weights for each."""
    return engine_bytes > _TWICE * weights_bytes + _SPARE


def graph_profiles(bundle: Bundle, role: str, entry: GraphEntry, *, max_batch: int, longest: int) -> list[EngineProfile]:
    """The one profile of a graph other than the decoder. `longest`: tokens of the largest context bucket."""
    contract = bundle.manifest.contract
    sizes: dict[str, Range] = {
        "batch": (1, 1, max_batch),
        "images": (1, 1, _IMAGES),
        "tiles": (1, 1, _TILES),
        "frames": (1, 8, _ROWS),
        "clips": (1, 1, 2),
        "texts": (1, 1, _ROWS),
        "states": (1, 1, _ROWS),
        "steps": (1, _STEPS // 2, _STEPS),
        "tokens": (1, _PATCHES // 16, _PATCHES),
        "sequence": (1, min(32, longest), longest),
    }
    if isinstance(contract, GenerativeContract):
        sizes |= _memory_sizes(bundle, contract)
        modality = next((one for one in contract.modalities if role in one.graphs), None)
        sizes |= _modality_sizes(modality)
    if role == "text_encoder":
        text = _text_length(bundle)
        sizes["sequence"] = (1, text, text)
    return [_profile("any", entry.inputs, sizes)]


def _profile(use: Literal["prefill", "decode", "any"], inputs: Sequence[TensorSpec], sizes: Mapping[str, Range]) -> EngineProfile:
    shapes = {spec.name: _shape(spec, sizes) for spec in inputs if any(isinstance(dim, str) for dim in spec.shape)}
    return EngineProfile(use=use, shapes=shapes)


def _shape(spec: TensorSpec, sizes: Mapping[str, Range]) -> ShapeRange:
    unknown = [dim for dim in spec.shape if isinstance(dim, str) and dim not in sizes]
    if unknown:
        raise TargetError(
            f"no sizes are known for the dimension {', '.join(unknown)} of '{spec.name}': TensorRT wants the smallest, the usual "
            f"and the largest; known are: {', '.join(sorted(sizes))}."
        )
    low, usual, high = (tuple(sizes[dim][which] if isinstance(dim, str) else dim for dim in spec.shape) for which in range(3))
    return ShapeRange(min=low, opt=usual, max=high)


def _memory_sizes(bundle: Bundle, contract: GenerativeContract) -> dict[str, Range]:
    """What cross-attention reads, and how many images a token may see."""
    memory = contract.memory
    if memory is None:
        return {}
    images = min(_IMAGES, *(one.most for one in contract.modalities if one.most), _IMAGES)
    found: dict[str, Range] = {"images": (1, 1, images)}
    if memory.source == "encoder":
        longest = memory.source_length or min(CHUNK, contract.context_length)
        return found | {"source": (1, longest // 2 or 1, longest)}
    entries = memory.entries_per_image or _entries(bundle, contract)
    if entries is None:
        return found | {"source": (1, CHUNK // 4, _PATCHES)}
    return found | {"source": (1, entries, entries * images)}


def _entries(bundle: Bundle, contract: GenerativeContract) -> int | None:
    """Entries that one row of the graph whose features are the memory has, where that is fixed."""
    modality = next((one for one in contract.modalities if one.joins == "memory"), None)
    shape = bundle.graphs[modality.graphs[-1]].outputs[0].shape if modality is not None else ()
    return shape[1] if len(shape) == 3 and isinstance(shape[1], int) else None


def _modality_sizes(modality: Modality | None) -> dict[str, Range]:
    if modality is None:
        return {}
    side = getattr(modality.placeholder, "merge_size", 1) ** 2
    found: dict[str, Range] = {"patches": (side, CHUNK // side * side, _PATCHES // side * side)}
    if modality.most is not None:
        found["images"] = (1, 1, min(_IMAGES, modality.most))
    if modality.instruction is not None:
        longest = modality.instruction.max_length
        found["instruction"] = (1, min(16, longest), longest)
    return found


def _text_length(bundle: Bundle) -> int:
    contract = bundle.manifest.contract
    contrast = contract.contrast if isinstance(contract, GenerativeContract) else contract
    return contrast.text_length if contrast is not None else CHUNK


def _block(contract: GenerativeContract) -> int:
    """Tokens of one image, which a chunk must not cut where they see each other."""
    if not any(one.kind == "blocks" and one.blocks == "images" for one in contract.token_inputs):
        return 0
    return max((getattr(one.placeholder, "tokens_per_image", 0) for one in contract.modalities), default=0)


def _generative(bundle: Bundle) -> GenerativeContract:
    contract = bundle.manifest.contract
    if not isinstance(contract, GenerativeContract):
        raise TargetError(f"{bundle.path}: family {contract.family} has no decoder.")
    return contract
