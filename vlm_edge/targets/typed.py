"""The last step for TensorRT: a correct fp32 graph in the target's operators becomes a strongly typed, quantised one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import islice
from typing import Literal

import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass, run_passes
from vlm_edge.passes.cleanup import Cleanup
from vlm_edge.passes.half_twin import choose_islands, name_nodes
from vlm_edge.passes.strong_types import FULL_INPUTS, FULL_OUTPUTS, HALVES, Half, Islands, StrongTypes
from vlm_edge.quantize.calibrate import activation_histograms, channel_maxima
from vlm_edge.quantize.qdq_blockwise import BLOCKS, BlockwiseDQ
from vlm_edge.quantize.qdq_formats import FP8, INT8, NumberFormat
from vlm_edge.quantize.qdq_linear import LinearQDQ, activations_to_calibrate
from vlm_edge.quantize.qdq_nvfp4 import Nvfp4Weights
from vlm_edge.quantize.smooth import SmoothActivations, smoothable
from vlm_edge_runtime.errors import TargetError

from .pipeline import Inputs
from .target import Options

GPU_WORDS = ("fp32", "fp16", "bf16", "int8", "int8w", "int4", "fp8", "fp8w", "nvfp4")
"""What a graph can be typed as: fp32, or half precision with its matrix products in this format (`w`, int4, nvfp4: weights

only). bf16 is half precision with 8 bits of exponent.
"""
_TRIED = 4
"""Calibration inputs that islands are tried on."""
_CALIBRATED: dict[str, NumberFormat] = {"int8": INT8, "fp8": FP8}
_WEIGHTS: dict[str, NumberFormat] = {"int8w": INT8, "fp8w": FP8}


def apply_types(
    model: ir.Model,
    *,
    word: str,
    head: str | None = None,
    block_size: int = 128,
    options: Options | None = None,
    calibration: Inputs | None = None,
    thresholds: Mapping[str, float] | None = None,
    islands: Islands | None = None,
    half: Half = "fp16",
    full_inputs: Collection[str] = FULL_INPUTS,
    full_outputs: Collection[str] = FULL_OUTPUTS,
) -> list[Changes]:
    """Quantises and types a graph in place, as the last passes of a TensorRT build; call it after `Cleanup`.

    `model`: fp32, standard operators only (the native or the decomposed form), Gemm already MatMul + Add.
    `word`: one of GPU_WORDS; `head`: the same for the product that makes the logits (None: as `word`). With fp32 for both
    nothing changes. `calibration`: inputs of *this* graph (its own signature) for the activation ranges of int8 and fp8;
    without them those words raise TargetError with what to do; `int8w` and `fp8w` need none. `thresholds`: the ranges themselves,
    found before (value name → magnitude of the largest code), as decoders have them. A head is always weight-only.
    `islands`: what stays fp32 (None: normalisations and softmax). Where there is `calibration`, None tries the graph on a few of
    its inputs with fewer islands first and keeps as many as it takes to stay within 1 % of the untyped one.
    Values: all float inputs and outputs become `half` except `full_inputs` and `full_outputs` (fp32); integer ones stay.
    Raises TargetError for a word that the graph cannot have.
    """
    options = options or Options()
    last = head or word
    for given in (word, last):
        if given not in GPU_WORDS:
            raise TargetError(f"'{given}' is no precision of a TensorRT graph; it can be: {', '.join(GPU_WORDS)}.")
    if "bf16" in (word, last):
        half = "bf16"
    changes = _smoothed(model, calibration, options.smooth) if word == "int8" else []
    if word in _CALIBRATED and thresholds is None:
        thresholds = _thresholds(model, word, options, calibration)
    changes += run_passes(model, _quantisers(word, last, block_size, options, thresholds, half))
    if word == last == "fp32":
        return changes
    if islands is None and calibration is not None and word != "nvfp4":  # which the CPU provider cannot run
        islands, tried = _tried(model, calibration, half)
        changes.append(tried)
    typing = StrongTypes(half, islands, full_inputs=full_inputs, full_outputs=full_outputs)
    return changes + run_passes(model, [typing, Cleanup()])


def _smoothed(model: ir.Model, calibration: Inputs | None, strength: float) -> list[Changes]:
    """Shares outliers between activations and weights, where the target's options ask for it."""
    if calibration is None or not strength:
        return []
    names = [str(norm.outputs[0].name) for norm in smoothable(model.graph)]
    return run_passes(model, [SmoothActivations(channel_maxima(model, names, calibration()), strength)])


def _tried(model: ir.Model, calibration: Inputs, half: Half) -> tuple[Islands, Changes]:
    """The islands that a graph needs on a few of its inputs, and a note that says how the choice came about."""
    feeds = list(islice(calibration(), _TRIED))
    name_nodes(model.graph)
    islands, trials = choose_islands(model.clone, feeds, half=half)
    changes = Changes("islands")
    said = "; ".join(f"{one.islands}: {one.relative:.1e}" for one in trials)
    changes.note(f"in fp32: {islands}. Relative difference to the untyped graph on {len(feeds)} inputs with {said}")
    return islands, changes


def _quantisers(
    word: str, head: str, block_size: int, options: Options, thresholds: Mapping[str, float] | None, half: Half
) -> list[GraphPass]:
    scales = HALVES[half][1]
    found: list[GraphPass] = []
    if word in _CALIBRATED:
        found.append(
            LinearQDQ(
                _CALIBRATED[word],
                thresholds,
                keep_first=options.keep_first,
                keep_last=options.keep_last,
                half=scales,
            )
        )
    for given, which in ((word, "body"), (head, "head")):
        form = _WEIGHTS.get(given) or (_CALIBRATED.get(given) if which == "head" else None)
        kept = {"keep_first": options.keep_first, "keep_last": options.keep_last} if which == "body" else {}
        if form is not None:
            found.append(LinearQDQ(form, None, body=which == "body", head=which == "head", half=scales, **kept))
        elif given == "nvfp4":
            found.append(Nvfp4Weights(body=which == "body", head=which == "head"))
        elif given == "int4":
            bits: Mapping[str, Literal[4]] = {which: 4}
            block = max((one for one in BLOCKS if one <= block_size), default=min(BLOCKS))
            found.append(BlockwiseDQ(**{"body": None, **bits}, block_size=block, scheme=options.scheme, half=scales))
    return found


def _thresholds(model: ir.Model, word: str, options: Options, calibration: Inputs | None) -> dict[str, float]:
    """The magnitude of the largest code of each activation. Raises TargetError without inputs to look at."""
    if calibration is None:
        raise TargetError(
            f"{word} needs to see what a graph is given: name some pictures to calibrate on, or, for a graph that no picture "
            f"passes through, choose {word}w (weights only) or fp16."
        )
    histograms = activation_histograms(model, activations_to_calibrate(model.graph), calibration())
    # fp8 has a wide range and few digits: clipping costs more than it gains.
    method = options.calibration if word == "int8" else "minmax"
    return {name: one.threshold(method) for name, one in histograms.items()}
