"""Checks by running it that an attention mask is the one its metadata claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vlm_edge_runtime.errors import TargetError

from .evaluate import evaluate, graph_inputs_of
from .graph import attribute_int

MASK = "vlm_edge.mask"
WINDOW = "vlm_edge.sliding_window"
WINDOWED_BLOCKS = "vlm_edge.windowed_blocks"
BLOCK_IDS = "block_ids"
SEEN = np.float32(-1e9)
"""An additive mask's values above this let a query see a key."""
_LONGEST = 4096
"""Windows longer than this are not probed past their edge: the mask alone would take hundreds of megabytes."""


@dataclass(slots=True, frozen=True)
class MaskRule:
    """What the exporter says of a mask; see `Mask` in vlm_edge/export/attention.py for the kinds."""

    kind: str
    window: int | None = None
    windowed_blocks: bool = False

    def __str__(self) -> str:
        return self.kind + (f" with window {self.window}" if self.window else "")


@dataclass(slots=True, frozen=True)
class Sizes:
    """Of one attention's cache: KV heads and the size of a head."""

    kv_heads: int
    head_dim: int


def mask_rule(attention: ir.Node) -> MaskRule:
    """The rule in the metadata that the exporter wrote. Raises TargetError without any."""
    kind = attention.metadata_props.get(MASK)
    if kind is None:
        raise TargetError(
            f"Attention node {attention.name or attention.outputs[0].name!r} does not say what its mask is (metadata "
            f"'{MASK}'): the portable graph was not written by this exporter; export the bundle again."
        )
    window = attention.metadata_props.get(WINDOW)
    return MaskRule(kind, int(window) if window else None, attention.metadata_props.get(WINDOWED_BLOCKS) == "1")


def expected_mask(rule: MaskRule, queries: int, past: int, block_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which keys each query may see, bool [queries, past + queries]; a window of w includes the query itself."""
    position = np.arange(queries)[:, None] + past
    key = np.arange(past + queries)[None, :]
    seen = key <= position
    near = key > position - rule.window if rule.window is not None else np.ones_like(seen)
    if rule.kind != "blocks":
        return np.asarray(seen & near)
    of_key = np.concatenate([np.zeros(past, np.int64), block_ids])[None, :]
    same = (block_ids[:, None] == of_key) & (of_key > 0)
    return np.asarray((seen | same) & near if rule.windowed_blocks else (seen & near) | same)


def check_mask(graph: ir.Graph, attention: ir.Node, rule: MaskRule, sizes: Sizes) -> None:
    """Evaluates the mask subgraph at a few lengths and compares. Raises TargetError where it is not what `rule` says.

    A fused kernel computes its own mask, so a mask that does more (a bidirectional image block, a prefix) would be lost
    without a trace; here it is found before anything is rewritten.
    """
    mask = attention.inputs[3]
    if mask is None:
        if attribute_int(attention, "is_causal", 0) and rule.kind == "causal":
            return
        raise TargetError(f"Attention node {attention.name!r} has neither a mask nor is_causal: it attends in both directions.")
    window = rule.window
    probes = [(5, 0), (1, 3), (3, 6), (8, 2)]
    if window is not None and window <= _LONGEST:
        probes += [(3, window + 2), (1, window - 1), (1, window), (window + 3, 0)]
    for queries, past in probes:
        if past < 0:
            continue
        blocks = np.array([0, 1, 1, 0, 2, 2, 2, 0], np.int64)[:queries]
        if queries > len(blocks) or (window is not None and queries > window):  # a block longer than the window
            blocks = np.array([0, *[1] * (queries - 1)], np.int64)
        found = evaluate_mask(graph, mask, queries, past, sizes, {BLOCK_IDS: blocks[None]})
        seen = np.asarray(found if found.dtype == np.bool_ else np.asarray(found, np.float32) > SEEN, np.bool_)
        wanted = expected_mask(rule, queries, past, blocks)
        shape = np.broadcast_shapes(seen.shape, wanted.shape)
        if not np.array_equal(np.broadcast_to(seen, shape), np.broadcast_to(wanted, shape)):
            raise TargetError(
                f"the mask of Attention node {attention.name!r} is not {rule} at {queries} queries after {past} keys, as its "
                "metadata says; the fused kernel cannot express it."
            )


def evaluate_mask(
    graph: ir.Graph,
    mask: ir.Value,
    queries: int,
    past: int,
    sizes: Sizes,
    more: Mapping[str, npt.NDArray[np.generic]] | None = None,
) -> npt.NDArray[np.generic]:
    """The mask of one row of `queries` tokens after `past` (all of them valid). `more`: further inputs by name."""
    feeds: dict[str, npt.NDArray[np.generic]] = {}
    for value in graph_inputs_of([mask]):
        name = str(value.name)
        feeds[name] = more[name] if more is not None and name in more else _feed(value, queries, past, sizes)
    return np.asarray(evaluate(graph, [mask], feeds)[0])


def _feed(value: ir.Value, queries: int, past: int, sizes: Sizes) -> npt.NDArray[np.generic]:
    """An input of the portable decoder for one row of `queries` tokens after `past` (all of them valid)."""
    name = str(value.name)
    if name == "attention_mask":
        return np.ones((1, past + queries), np.int64)
    if name == "position_ids":
        positions = np.arange(past, past + queries, dtype=np.int64)[None]
        axes = 1 if value.shape is None or len(value.shape) == 2 else 3  # M-RoPE has three
        return positions if axes == 1 else np.repeat(positions[None], axes, axis=0)

    if name.startswith("past_key_values."):
        return np.zeros((1, sizes.kv_heads, past, sizes.head_dim), np.float32)
    if name == "inputs_embeds" and value.shape is not None and isinstance(hidden := value.shape[-1], int):
        return np.zeros((1, queries, hidden), np.float32)
    raise TargetError(f"the attention mask depends on '{name}', which a causal mask never does: it cannot be lowered.")
