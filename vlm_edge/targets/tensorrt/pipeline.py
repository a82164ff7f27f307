"""Which passes a graph goes through for TensorRT and TensorRT-RTX, by what it is and by what the target's parser imports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass, run_passes
from vlm_edge.passes.cleanup import Cleanup
from vlm_edge.passes.flatten import Unflatten
from vlm_edge.passes.gemm import GemmToMatMul
from vlm_edge.passes.last_token import LastTokenLogits
from vlm_edge.passes.layout import CancelLayout
from vlm_edge.passes.recompose_rotary import RecomposeRotary
from vlm_edge.passes.tensorrt.decompose_attention import DecomposeAttention
from vlm_edge.passes.tensorrt.decompose_norms import DecomposeGroupNormalization, DecomposeRMSNormalization
from vlm_edge.passes.tensorrt.decompose_rotary import DecomposeRotary
from vlm_edge.passes.tensorrt.dense_selection import DenseSelection
from vlm_edge.passes.tensorrt.lower_opset import LowerOpset
from vlm_edge.passes.tensorrt.narrow_integers import NarrowIntegers
from vlm_edge.passes.tensorrt.native_attention import NativeAttention
from vlm_edge.passes.tensorrt.positive_indices import PositiveIndices
from vlm_edge.passes.tensorrt.single_step import SingleStep
from vlm_edge.passes.tensorrt.static_cache import StaticCache
from vlm_edge.passes.tensorrt.unique_names import UniqueNames
from vlm_edge.passes.tensorrt.unused_inputs import DropUnusedInputs
from vlm_edge.quantize.calibrate import activation_histograms
from vlm_edge.quantize.qdq_linear import activations_to_calibrate
from vlm_edge.targets.device import Device
from vlm_edge.targets.pipeline import Inputs, Lowered
from vlm_edge.targets.precision import Kind, stored_as
from vlm_edge.targets.samples import Feeds
from vlm_edge.targets.steps import static_cache_feeds
from vlm_edge.targets.target import Target
from vlm_edge.targets.typed import apply_types
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.errors import TargetError

_CACHE_OPSET, _NATIVE_OPSET, _DECOMPOSED_OPSET = 24, 23, 20
"""Where TensorScatter came; where Attention, RMSNormalization and RotaryEmbedding came; what older parsers take."""


def lower(
    bundle: Bundle,
    role: str,
    kind: Kind,
    words: Mapping[str, str],
    target: Target,
    *,
    capacity: int | None = None,
    block_size: int = 128,
    calibration: Inputs | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> Lowered:
    """One portable graph of `bundle` → the strongly typed graph that `target`'s TensorRT parses.

    `words`: the precision of every role, as `resolve_precision` gives it. `capacity`: slots of a decoder's cache (one graph per
    context bucket; nothing but that number differs between them), None for any other graph. `calibration`: inputs of the portable
    graph, for graphs whose activations are quantised; for a decoder `thresholds` instead, as `decoder_thresholds` finds them.

    A decoder keeps its cache in slots 0, 1, … of `past_key_values.{i}.key/.value` [batch, kv_heads, capacity, head_dim], reads
    `past_lengths` int32 [batch] in place of `attention_mask`, and gives the last token's `logits` [batch, 1, vocabulary].
    A recurrent decoder takes one token a call. int64 inputs and outputs become int32. Whoever parses the graph sets
    `decomposable` on its attentions (see `NativeAttention`). Raises TargetError, naming the node, for what the target cannot
    express.
    """
    model = ir.load(bundle.graph_path(role))
    changes = lower_exactly(model, kind, target.gpu()[0], capacity=capacity)
    changes += apply_types(
        model,
        word=stored_as(kind, words[role], target.backend),
        head=stored_as("head", words["lm_head"]) if kind == "decoder" else None,
        thresholds=thresholds,
        block_size=block_size,
        options=target.options,
        calibration=_as_taken(model, calibration) if calibration is not None else None,
    )
    return Lowered(model, changes)


def decoder_thresholds(bundle: Bundle, role: str, target: Target, calibration: Sequence[Feeds]) -> dict[str, float]:
    """The magnitude of the largest int8 code of every activation that a lowered decoder's products read, by value name.

    `calibration`: prefills of the portable decoder (no past). They are seen by the decoder in the target's operators, in fp32 and
    with a cache that is just long enough: names are the same whatever the capacity. Raises TargetError for a recurrent decoder.
    """
    if any(spec.name.startswith("state.") for spec in bundle.graphs[role].inputs):
        raise TargetError(f"{role} has a recurrent state, and its activations are not calibrated: choose int8w or fp16 for it.")
    longest = max(feeds["inputs_embeds"].shape[1] for feeds in calibration)
    model = ir.load(bundle.graph_path(role))
    run_passes(model, passes_for(model, "decoder", target.gpu()[0], capacity=longest))
    taken = [str(value.name) for value in model.graph.inputs]
    static = "past_lengths" in taken

    def inputs() -> Iterator[Feeds]:
        for feeds in calibration:
            found = static_cache_feeds(feeds, capacity=longest) if static else feeds
            yield {name: found[name] for name in taken}

    histograms = activation_histograms(model, activations_to_calibrate(model.graph), _as_taken(model, inputs)())
    return {name: one.threshold(target.options.calibration) for name, one in histograms.items()}


def lower_exactly(model: ir.Model, kind: Kind, device: Device, *, capacity: int | None = None) -> list[Changes]:
    """The first half of `lower`, in place: the target's operators, everything still in fp32.

    What comes out computes the same as the portable graph, to 1e-4, and ONNX Runtime runs it.
    """
    return run_passes(model, passes_for(model, kind, device, capacity=capacity))


def passes_for(model: ir.Model, kind: Kind, device: Device, *, capacity: int | None = None) -> list[GraphPass]:
    """The passes of `lower_exactly`, in order. Raises TargetError for a decoder with a cache and no `capacity`."""
    native = frozenset(device.imports)
    cached = any(str(value.name).startswith("past_key_values.") for value in model.graph.inputs)
    if kind == "decoder" and cached and (capacity is None or capacity < 1):
        raise TargetError("a decoder's cache has a static capacity in TensorRT: say for how many tokens.")
    scatter = cached and "TensorScatter" in native
    steps: list[GraphPass] = [Cleanup(), *([SingleStep()] if kind == "decoder" else []), GemmToMatMul(), DenseSelection()]
    if kind == "decoder":
        steps.append(RecomposeRotary())
        if cached and capacity is not None:
            steps.append(StaticCache(capacity, "TensorScatter" if scatter else "ScatterND"))
    steps += [Unflatten(), CancelLayout()]
    if kind == "decoder":
        steps.append(LastTokenLogits())
    steps += [PositiveIndices(), DecomposeGroupNormalization()]
    steps.append(DecomposeAttention(softcap_only="Attention" in native))
    if "Attention" in native:
        steps.append(NativeAttention())
    if "RotaryEmbedding" not in native:
        steps.append(DecomposeRotary())
    if "RMSNormalization" not in native:
        steps.append(DecomposeRMSNormalization())
    wanted = _CACHE_OPSET if scatter else _NATIVE_OPSET if native else _DECOMPOSED_OPSET
    steps += [
        CancelLayout(),
        NarrowIntegers(),
        Cleanup(),
        DropUnusedInputs(),
        UniqueNames(),
        LowerOpset(min(wanted, device.opset)),
    ]
    return steps


def _as_taken(model: ir.Model, calibration: Inputs) -> Inputs:
    """Inputs of a portable graph as its lowered one takes them: int32 for int64."""
    narrow = {str(value.name) for value in model.graph.inputs if value.dtype == ir.DataType.INT32}

    def inputs() -> Iterator[Mapping[str, npt.NDArray[Any]]]:
        for feeds in calibration():
            yield {name: array.astype(np.int32) if name in narrow else array for name, array in feeds.items()}

    return inputs
