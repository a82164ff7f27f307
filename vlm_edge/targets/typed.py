"""The last step for TensorRT: a correct fp32 graph in the target's operators becomes a strongly typed, quantised one."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from vlm_edge.passes.base import Changes
from vlm_edge.passes.strong_types import FULL_INPUTS, FULL_OUTPUTS, Half, Islands

from .pipeline import Inputs
from .target import Options

GPU_WORDS = ("fp32", "fp16", "bf16", "int8", "int8w", "int4", "fp8", "fp8w", "nvfp4")
"""What a graph can be typed as: fp32, or half precision with its matrix products in this format (`w`, int4, nvfp4: weights

only). bf16 is half precision with 8 bits of exponent.
"""


def apply_types(
    model: ir.Model,
    *,
    word: str,
    head: str | None = None,
    block_size: int = 128,
    options: Options | None = None,
    calibration: Inputs | None = None,
    islands: Islands | None = None,
    half: Half = "fp16",
    full_inputs: Collection[str] = FULL_INPUTS,
    full_outputs: Collection[str] = FULL_OUTPUTS,
) -> list[Changes]:
    """Quantises and types a graph in place, as the last passes of a TensorRT build; call it after `Cleanup`.

    `model`: fp32, standard operators only (the native or the decomposed form), Gemm already MatMul + Add.
    `word`: one of GPU_WORDS; `head`: the same for the product that makes the logits (None: as `word`). With fp32 nothing
    changes. `calibration`: inputs of *this* graph (its own signature) for the activation ranges of int8 and fp8; without
    them those words raise TargetError with what to do; `int8w` and `fp8w` need none. For decoders pass `int8w` where the user
    said int8 (as `stored_as` does).
    Values: all float inputs and outputs become `half` except `full_inputs` and `full_outputs` (fp32); integer ones stay.
    Raises TargetError for a word that the graph cannot have.
    """
    raise NotImplementedError
