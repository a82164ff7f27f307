"""Which passes a graph goes through, by what it is (decoder, encoder, embedding table) and its precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass, run_passes
from vlm_edge.passes.block_attention import BlockAttention
from vlm_edge.passes.centred_norm import FuseCentredNorm
from vlm_edge.passes.cleanup import Cleanup
from vlm_edge.passes.flatten import Unflatten
from vlm_edge.passes.fuse_rotary import FuseRotaryEmbedding
from vlm_edge.passes.fuse_skip_norm import FuseSkipNorm
from vlm_edge.passes.gemm import GemmToMatMul
from vlm_edge.passes.group_query_attention import LowerToGroupQueryAttention
from vlm_edge.passes.last_token import LastTokenLogits
from vlm_edge.passes.layout import CancelLayout
from vlm_edge.passes.multi_head_attention import LowerToMultiHeadAttention
from vlm_edge.passes.pack_qkv import PackQKV
from vlm_edge.passes.recompose_rotary import RecomposeRotary
from vlm_edge.quantize.blockwise import BlockFormat
from vlm_edge.quantize.calibrate import activation_histograms
from vlm_edge.quantize.dynamic import DynamicInt8MatMul
from vlm_edge.quantize.embedding import EmbeddingStorage
from vlm_edge.quantize.static import StaticInt8MatMul, calibrated_inputs
from vlm_edge.quantize.weight_only import WeightOnlyMatMul

from .native.plan_file import Plan
from .target import Options

Inputs = Callable[[], Iterable[Mapping[str, npt.NDArray[Any]]]]
"""Calibration inputs of one graph; called when they are needed."""


@dataclass(slots=True)
class Lowered:
    """One graph after its passes.

    `plan`: what native kernels run in its place. `kernels`: what runs it, and why, where the target leaves a choice: "native" or
    "onnxruntime: the reason".
    """

    model: ir.Model
    changes: list[Changes] = field(default_factory=list)
    plan: Plan | None = None
    kernels: str = ""

    @property
    def changed(self) -> bool:
        """Whether the graph is worth keeping beside the portable one: it is a plan, or more than cleaning up was done."""
        return self.plan is not None or any(change for change in self.changes if change.name != Cleanup.name)

    @property
    def notes(self) -> list[str]:
        """What was left as it was, and why."""
        return [f"{change.name}: {note}" for change in self.changes for note in change.notes]


def lower_decoder(
    model: ir.Model,
    *,
    precision: str,
    head: str,
    context_length: int,
    block_size: int = 32,
    options: Options | None = None,
    branches: bool = True,
) -> Lowered:
    """Portable decoder → GroupQueryAttention on a shared KV buffer, last-token logits, weights in `precision`.

    `precision` and `head` (the logits' product) are fp32, int8 or int4, weights only. Without `branches`, attention in which the
    tokens of a block see each other stays one operator, told by its metadata, and cross-attention with fewer key heads than query
    heads the standard one: for a plan, not for ONNX Runtime. Raises
    TargetError for a decoder that the target cannot run (see LowerToGroupQueryAttention).
    """
    options = options or Options()
    steps: list[GraphPass] = [
        Cleanup(),
        GemmToMatMul(),
        FuseCentredNorm(),
        RecomposeRotary(interleaved=True),
        LowerToGroupQueryAttention(context_length),
        LowerToMultiHeadAttention(grouped=branches),
        Unflatten(),
        CancelLayout(),
        FuseRotaryEmbedding(context_length),
        PackQKV(),
        *([BlockAttention()] if branches else []),
        LastTokenLogits(),
        FuseSkipNorm(),
        Cleanup(),
        *_decoder_weights(precision, head, block_size, options),
    ]
    return Lowered(model, run_passes(model, steps))


def lower_growing_decoder(
    model: ir.Model, *, why: str, precision: str, head: str, block_size: int = 32, options: Options | None = None
) -> Lowered:
    """A decoder that no shared KV buffer fits: its cache goes on growing by concatenation, the rest is as in `lower_decoder`.

    Right for any portable decoder, and slow: the cache is copied at every token. `why` goes into the notes.
    """
    steps: list[GraphPass] = [
        Cleanup(),
        GemmToMatMul(),
        RecomposeRotary(),
        LowerToMultiHeadAttention(),
        Unflatten(),
        CancelLayout(),
        LastTokenLogits(),
        FuseSkipNorm(),
        Cleanup(),
        *_decoder_weights(precision, head, block_size, options or Options()),
    ]
    changes = run_passes(model, steps)
    changes.append(Changes("kv_cache", notes=[f"the cache grows at every token instead of staying in one buffer: {why}"]))
    return Lowered(model, changes)


def lower_recurrent_decoder(
    model: ir.Model, *, precision: str, head: str, block_size: int = 32, options: Options | None = None
) -> Lowered:
    """A decoder that keeps states instead of a KV cache: last-token logits, weights in `precision`.

    Weights inside its loop over tokens stay as they are.
    """
    steps: list[GraphPass] = [
        Cleanup(),
        GemmToMatMul(),
        CancelLayout(),
        LastTokenLogits(),
        FuseSkipNorm(),
        Cleanup(),
        *_decoder_weights(precision, head, block_size, options or Options()),
    ]
    return Lowered(model, run_passes(model, steps))


def _decoder_weights(precision: str, head: str, block_size: int, options: Options) -> list[GraphPass]:
    if precision == head == "fp32":
        return []
    body, last = (_form(word, block_size, options) for word in (precision, head))
    return [_weight_only(body, last, options), Cleanup()]


def lower_encoder(
    model: ir.Model,
    *,
    precision: str,
    block_size: int = 32,
    options: Options | None = None,
    calibration: Inputs | None = None,
) -> Lowered:
    """Vision encoder, projector or text encoder → fused attention and norms, weights in `precision`.

    `precision` is fp32, int8 (weights and activations: static ranges when `calibration` gives inputs, else dynamic),
    int8w or int4 (weights only). Unless it is fp32, token tables inside the graph are stored in half precision.
    """
    options = options or Options()
    steps: list[GraphPass] = [
        Cleanup(),
        GemmToMatMul(),
        LowerToMultiHeadAttention(),
        Unflatten(),
        CancelLayout(),
        FuseSkipNorm(),
        Cleanup(),
    ]
    changes = run_passes(model, steps)
    if precision != "fp32":
        changes += run_passes(model, [EmbeddingStorage("fp16")])
    if precision == "int8":
        changes += run_passes(model, [_integer(model, options, calibration), Cleanup()])
    elif precision != "fp32":
        form = _form(precision, block_size, options)
        changes += run_passes(model, [WeightOnlyMatMul(form, accuracy_level=options.accuracy_level), Cleanup()])
    return Lowered(model, changes)


def lower_embedding(model: ir.Model, *, precision: Literal["fp32", "fp16", "int8", "int4"], block_size: int = 32) -> Lowered:
    """Token embedding → its table stored in `precision`."""
    steps: list[GraphPass] = [] if precision == "fp32" else [EmbeddingStorage(precision, block_size), Cleanup()]
    return Lowered(model, run_passes(model, steps))


def _form(word: str, block_size: int, options: Options) -> BlockFormat | None:
    if word == "fp32":
        return None
    return BlockFormat(bits=4 if word == "int4" else 8, block_size=block_size, symmetric=options.symmetric, scheme=options.scheme)


def _weight_only(body: BlockFormat | None, head: BlockFormat | None, options: Options) -> WeightOnlyMatMul:
    return WeightOnlyMatMul(body, head=head, keep_head=head is None, accuracy_level=options.accuracy_level)


def _integer(model: ir.Model, options: Options, calibration: Inputs | None) -> GraphPass:
    kept = {"weight_bits": options.weight_bits, "keep_first": options.keep_first, "keep_last": options.keep_last}
    if calibration is None:
        return DynamicInt8MatMul(**kept)
    found = activation_histograms(model, calibrated_inputs(model), calibration())
    thresholds = {name: one.threshold(options.calibration) for name, one in found.items()}
    return StaticInt8MatMul(thresholds, fused=True, **kept)
