"""Checks by running it that an attention mask is the one its metadata claims."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge_runtime.errors import TargetError

from .evaluate import evaluate, graph_inputs_of

MASK = "vlm_edge.mask"
WINDOW = "vlm_edge.sliding_window"
_LONGEST = 4096
"""Windows longer than this are not probed past their edge: the mask alone would take hundreds of megabytes."""


def mask_kind(attention: ir.Node) -> tuple[str, int | None]:
    """(kind, sliding window or None) from the metadata that the exporter wrote. Raises TargetError without any."""
    kind = attention.metadata_props.get(MASK)
    if kind is None:
        raise TargetError(
            f"Attention node {attention.name or attention.outputs[0].name!r} does not say what its mask is (metadata "
            f"'{MASK}'): the portable graph was not written by this exporter; export the bundle again."
        )
    window = attention.metadata_props.get(WINDOW)
    return kind, int(window) if window else None


def expected_causal(queries: int, past: int, window: int | None) -> npt.NDArray[np.bool_]:
    """Which keys each query may see, bool [queries, past + queries]; a window of w includes the query itself."""
    position = np.arange(queries)[:, None] + past
    key = np.arange(past + queries)[None, :]
    seen = key <= position
    return seen if window is None else seen & (key > position - window)


def check_causal(graph: ir.Graph, attention: ir.Node, window: int | None, kv_heads: int, head_dim: int) -> None:
    """Evaluates the mask subgraph at a few lengths and compares. Raises TargetError where it is not plain causal.

    A fused kernel computes its own mask, so a mask that does more (a bidirectional image block, a prefix) would be lost
    without a trace; here it is found before anything is rewritten.
    """
    mask = attention.inputs[3]
    if mask is None:
        if attention.attributes["is_causal"].as_int() if "is_causal" in attention.attributes else 0:
            return
        raise TargetError(f"Attention node {attention.name!r} has neither a mask nor is_causal: it attends in both directions.")
    needed = graph_inputs_of([mask])
    probes = [(5, 0), (1, 3), (3, 6)]
    if window is not None and window <= _LONGEST:
        probes += [(3, window + 2), (1, window - 1), (1, window), (window + 2, 0)]
    for queries, past in probes:
        if past < 0:
            continue
        feeds = {str(value.name): _feed(value, queries, past, kv_heads, head_dim) for value in needed}
        (found,) = evaluate(graph, [mask], feeds)
        seen = found if found.dtype == np.bool_ else found > np.float32(-1e9)
        wanted = expected_causal(queries, past, window)
        shape = np.broadcast_shapes(seen.shape, wanted.shape)
        if not np.array_equal(np.broadcast_to(seen, shape), np.broadcast_to(wanted, shape)):
            raise TargetError(
                f"the mask of Attention node {attention.name!r} is not causal{f' with window {window}' if window else ''} at "
                f"{queries} queries after {past} keys, as its metadata says; the fused kernel cannot express it."
            )


def _feed(value: ir.Value, queries: int, past: int, kv_heads: int, head_dim: int) -> npt.NDArray[np.generic]:
    """An input of the portable decoder for one row of `queries` tokens after `past` (all of them valid)."""
    name = str(value.name)
    if name == "attention_mask":
        return np.ones((1, past + queries), np.int64)
    if name == "position_ids":
        positions = np.arange(past, past + queries, dtype=np.int64)[None]
        axes = 1 if value.shape is None or len(value.shape) == 2 else 3  # M-RoPE has three
        return positions if axes == 1 else np.repeat(positions[None], axes, axis=0)

    if name.startswith("past_key_values."):
        return np.zeros((1, kv_heads, past, head_dim), np.float32)
    if name == "inputs_embeds" and value.shape is not None and isinstance(hidden := value.shape[-1], int):
        return np.zeros((1, queries, hidden), np.float32)
    raise TargetError(f"the attention mask depends on '{name}', which a causal mask never does: it cannot be lowered.")
