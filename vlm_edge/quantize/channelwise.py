"""Per-channel int8 weights for integer matrix products."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge.passes.base import Changes
from vlm_edge.passes.graph import add_initializer, is_weight, lazy_tensor, rank

Floats = npt.NDArray[np.float32]


def channel_scales(weight: Floats, bits: int) -> Floats:
    """One scale per output channel of a weight [K, N]: float32 [N], symmetric. Raises ValueError on NaN or infinity."""
    largest = np.abs(weight).max(axis=0)
    if not np.isfinite(largest).all():
        raise ValueError("the weight has NaN or infinite values: it cannot be quantised")
    return np.where(largest > 0, largest / np.float32(2 ** (bits - 1) - 1), 1).astype(np.float32)


def channel_codes(weight: Floats, scales: Floats, bits: int) -> npt.NDArray[np.int8]:
    """int8 codes [K, N], within ±(2^(bits−1) − 1)."""
    limit = 2 ** (bits - 1) - 1
    return np.asarray(np.clip(np.rint(weight / scales[None, :]), -limit, limit), np.int8)


def store_channelwise(graph: ir.Graph, weight: ir.Value, bits: int) -> tuple[ir.Value, ir.Value]:
    """(codes int8 [K, N], scales float32 [N]) of a stored weight [K, N]; the codes are computed when saved."""
    tensor = weight.const_value
    assert tensor is not None
    scales = channel_scales(np.asarray(tensor.numpy(), np.float32), bits)
    name = f"{weight.name}.int8"
    shape = tuple(int(size) for size in tensor.shape.numpy())
    codes = lazy_tensor(
        name, ir.DataType.INT8, shape, lambda: channel_codes(np.asarray(tensor.numpy(), np.float32), scales, bits)
    )
    return add_initializer(graph, name, codes), add_initializer(graph, f"{name}.scales", scales)


def linear_layers(graph: ir.Graph, changes: Changes, keep_first: int, keep_last: int) -> Iterator[tuple[ir.Node, ir.Value]]:
    """(MatMul, its stored fp32 weight [K, N]) of all linear layers but the first and last few, in graph order."""
    found: list[tuple[ir.Node, ir.Value]] = []
    for node in graph:
        if node.op_type != "MatMul" or node.domain:
            continue
        weight = node.inputs[1]
        if weight is None or not is_weight(weight) or node.inputs[0] is None or is_weight(node.inputs[0]):
            continue
        if rank(weight) == 2 and weight.dtype == ir.DataType.FLOAT:
            found.append((node, weight))
        elif weight.dtype is not None and weight.dtype.is_floating_point():
            changes.note(f"{weight.name}: {weight.dtype} {weight.shape} stays as it is (only fp32 matrices are quantised)")
    kept = found[:keep_first] + (found[-keep_last:] if keep_last else [])
    for _, weight in kept:
        changes.note(f"{weight.name}: kept in fp32 (first {keep_first}, last {keep_last} layers)")
    yield from found[keep_first : len(found) - keep_last]
