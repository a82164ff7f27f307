"""Whether the passes to TensorRT's operators change what a graph computes, seen before types and quantisation blur it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir

from vlm_edge.targets.device import Device
from vlm_edge.targets.precision import Kind
from vlm_edge.targets.samples import Samples
from vlm_edge.targets.selfcheck import Difference, check_decoder, check_encoder
from vlm_edge_runtime.bundle.reader import Bundle

from .pipeline import lower_exactly


def exact_difference(
    bundle: Bundle, role: str, kind: Kind, device: Device, samples: Samples, *, capacity: int | None = None
) -> Difference:
    """How far the lowered fp32 graph of `role` is from the portable one, both on ONNX Runtime's CPU provider.

    Anything above FP32_TOLERANCE is a fault of the passes, whatever precision the build has. Takes as much temporary disk as the
    graph has weights in fp32. Raises TargetError for what the target cannot express.
    """
    model = ir.load(bundle.graph_path(role))
    lower_exactly(model, kind, device, capacity=capacity)
    with tempfile.TemporaryDirectory(prefix="vlm-edge-exact-") as folder:
        path = Path(folder) / f"{role}.onnx"
        ir.save(model, path, external_data=f"{role}.onnx.data")
        if kind == "decoder":
            return check_decoder(bundle, path, samples)
        return check_encoder(bundle, role, path, samples)
