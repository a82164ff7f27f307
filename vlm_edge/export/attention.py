"""The attention that replaces every model's own while it is traced: one standard ONNX `Attention` per call.

transformers lets an attention function and a mask function be registered by name (its AttentionInterface). While a model
runs under that name, its own code still decides *which* positions may see each other; ours only writes the decision down as one
additive mask and hands query, key, value, mask and past to `Attention` (opset 23,
https://onnx.ai/onnx/operators/onnx__Attention.html). What each call was is recorded, so that passes need not guess it back
from the graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm_edge_runtime.errors import ExportError

IMPLEMENTATION = "vlm_edge"
"""The name under which both functions are registered with transformers."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Which positions a mask lets see each other: `causal`, `bidirectional`, `blocks` or `explicit` (anything else).

    `blocks`: causal, and new tokens of one block (`block_ids`, see `blocks`) see each other in both directions.
    `sliding_window`: a query sees only this many newest positions, itself included; None is no limit.
    `windowed_blocks`: the window limits how far back a token sees in its own block too (Gemma 3), not only what it sees causally
    (PaliGemma 2).
    """

    kind: str
    sliding_window: int | None = None
    windowed_blocks: bool = False


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One attention of the graph and the module that made it. `layer` is the cache layer, or the position among encoders."""

    module: torch.nn.Module
    layer: int
    mask: Mask
    softcap: float = 0.0
    has_past: bool = False


@dataclass(slots=True)
class Recorder:
    """What happened between the model, its cache and the attention function during one forward."""

    calls: list[AttentionCall] = field(default_factory=list)
    _masks: list[tuple[torch.Tensor, Mask]] = field(default_factory=list)
    _keys: list[tuple[torch.Tensor, PastLayer]] = field(default_factory=list)
    _static: list[tuple[torch.Tensor, StaticLayer]] = field(default_factory=list)

    def add_mask(self, tensor: torch.Tensor, mask: Mask) -> None:
        self._masks.append((tensor, mask))

    def mask_of(self, tensor: torch.Tensor | None) -> Mask:
        if tensor is None:
            return Mask("bidirectional")
        return next((mask for known, mask in self._masks if known is tensor), Mask("explicit"))

    def add_key(self, tensor: torch.Tensor, layer: PastLayer) -> None:
        self._keys.append((tensor, layer))

    def layer_of(self, key: torch.Tensor) -> PastLayer | None:
        return next((layer for known, layer in self._keys if known is key), None)

    def add_static(self, tensor: torch.Tensor, layer: StaticLayer) -> None:
        self._static.append((tensor, layer))

    def static_of(self, key: torch.Tensor) -> StaticLayer | None:
        return next((layer for known, layer in self._static if known is key), None)


_recorder: Recorder | None = None
_block_ids: tuple[torch.Tensor, bool] | None = None


@contextmanager
def recording() -> Iterator[Recorder]:
    """Records the attention calls of the forward inside. Not reentrant: one trace at a time in a process."""
    global _recorder
    if _recorder is not None:
        raise ExportError("A trace is already running in this process; export one model at a time.")
    _recorder = Recorder()
    try:
        yield _recorder
    finally:
        _recorder = None


@contextmanager
def blocks(block_ids: torch.Tensor, *, windowed: bool = False) -> Iterator[None]:
    """Every causal mask drawn inside also lets the new tokens of one block see each other in both directions.

    `block_ids` int64 `[batch, sequence]` numbers the blocks among the new tokens from 1; 0 is a token of none. What is in the
    cache has no block any more: it is seen causally. `windowed`: whether a sliding window limits a block too (see `Mask`).
    """
    global _block_ids
    before, _block_ids = _block_ids, (block_ids, windowed)
    try:
        yield
    finally:
        _block_ids = before


class PastLayer(DynamicLayer):
    """A cache layer whose past is kept aside for the `Attention` op, which concatenates by itself.

    The model is handed the concatenation, whose length it may ask for; the attention function takes only what is new.
    """

    def __init__(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.index = index
        self.keys, self.values = key, value
        self._length = key.shape[-2]
        self.dtype, self.device = key.dtype, key.device
        self.is_initialized = True
        self.new: tuple[torch.Tensor, torch.Tensor] | None = None
        self.present: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.new = key_states, value_states
        joined = torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)
        if _recorder is not None:
            _recorder.add_key(joined[0], self)
        return joined

    def get_seq_length(self) -> int:
        return self._length


class StaticLayer(DynamicLayer):
    """Keys and values `[batch, heads, source, head_dim]` that cross-attention reads as they are."""

    def __init__(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.index = index
        self.keys, self.values = key, value
        self.dtype, self.device = key.dtype, key.device
        self.is_initialized = True
        if _recorder is not None:
            _recorder.add_static(key, self)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise ExportError(f"Decoder layer {self.index} computes its cross-attention keys instead of reading those it is given.")


class PastCache(Cache):
    """The whole past: `[batch, kv_heads, past, head_dim]` keys and values, one pair per layer."""

    def __init__(self, past: Sequence[torch.Tensor]) -> None:
        self.past = [PastLayer(i, past[2 * i], past[2 * i + 1]) for i in range(len(past) // 2)]
        super().__init__(layers=[*self.past])

    def presents(self) -> tuple[torch.Tensor, ...]:
        """Key and value after this step, layer by layer. Raises ExportError when a layer's attention was not ours."""
        flat: list[torch.Tensor] = []
        for layer in self.past:
            if layer.present is None:
                raise ExportError(
                    f"Decoder layer {layer.index} does not go through transformers' attention interface, so its cache cannot be "
                    "carried in the graph; this architecture needs a family of its own."
                )
            flat.extend(layer.present)
        return tuple(flat)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention as one op; query `[batch, heads, queries, head_dim]` → `[batch, queries, heads, head_dim]`.

    The number of key and value heads may divide the number of query heads (grouped queries, arXiv 2305.13245). `position_bias`
    `[batch or 1, heads, queries, keys]` is added to the scores (T5, arXiv 1910.10683, section 2.1).
    """
    layer = _recorder.layer_of(key) if _recorder else None
    static = _recorder.static_of(key) if _recorder else None
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    unmasked_causal = attention_mask is None and causal
    if unmasked_causal and layer is not None:
        raise ExportError("A decoder layer asked for causal attention over a past without a mask, which has no standard op.")
    past = (layer.keys, layer.values) if layer else (None, None)
    if layer is not None and layer.new is not None:
        key, value = layer.new
    # Cross-attention of the T5 kind has no bias of its own and passes zeros.
    if position_bias is not None and (static is None or getattr(module, "has_relative_attention_bias", True)):
        attention_mask = position_bias if attention_mask is None else attention_mask + position_bias
    output, present_key, present_value, _ = torch.onnx.ops.attention(
        query,
        key,
        value,
        attention_mask,
        *past,
        is_causal=unmasked_causal,
        scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        softcap=float(softcap or 0.0),
    )
    if layer is not None:
        layer.present = (present_key, present_value)
    if _recorder is not None:
        mask = Mask("causal") if unmasked_causal else _recorder.mask_of(attention_mask)
        index = layer.index if layer else static.index if static else len(_recorder.calls)
        _recorder.calls.append(AttentionCall(module, index, mask, float(softcap or 0.0), layer is not None))
    return output.transpose(1, 2).contiguous(), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The additive mask `[batch, 1, queries, keys]`: 0 where a query may look, the type's minimum where it may not.

    The minimum and not −inf, as in transformers' eager attention: a row that sees nothing (left padding) stays finite.
    Returns None where every query sees every key.
    """
    mask = _describe(mask_function)
    queries = (torch.arange(q_length, device=device) + q_offset)[:, None]
    keys = (torch.arange(kv_length, device=device) + kv_offset)[None, :]
    if mask.kind == "bidirectional":
        allowed = None
    elif mask.kind == "causal":
        allowed = (keys <= queries)[None, None]
        window = None if mask.sliding_window is None else (keys > queries - mask.sliding_window)[None, None]
        if _block_ids is not None:
            ids, windowed = _block_ids
            mask = Mask("blocks", mask.sliding_window, windowed and window is not None)
            if window is not None and not windowed:
                allowed, window = allowed & window, None
            allowed = allowed | _same_block(ids, kv_length)
        if window is not None:
            allowed = allowed & window
    elif _block_ids is not None:
        raise ExportError("A decoder layer draws a mask of its own, into which blocks of tokens that see each other do not fit.")
    else:
        rows = torch.arange(batch_size, device=device)[:, None, None, None]
        heads = torch.zeros(1, dtype=torch.long, device=device)[None, :, None, None]
        allowed = mask_function(rows, heads, queries[None, None], keys[None, None])
    if attention_mask is not None:
        seen = attention_mask[:, None, None, :].to(torch.bool)
        allowed = seen.expand(-1, -1, q_length, -1) if allowed is None else allowed & seen
    if allowed is None:
        return None
    zero, lowest = torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min, dtype=dtype)
    additive = torch.where(allowed, zero, lowest)
    if _recorder is not None:
        _recorder.add_mask(additive, mask)
    return additive


def _same_block(block_ids: torch.Tensor, kv_length: int) -> torch.Tensor:
    """Which new token is in whose block, bool `[batch, 1, queries, keys]`; the keys of the past are in none."""
    of_query = block_ids[:, None, :, None]
    of_key = torch.nn.functional.pad(block_ids, (kv_length - block_ids.shape[1], 0))[:, None, None, :]
    return (of_query == of_key) & (of_query > 0)


def _describe(mask_function: Callable[..., Any]) -> Mask:
    """Recognises the rules that transformers composes; a rule not known here is carried as the mask it draws."""
    if mask_function is causal_mask_function:
        return Mask("causal")
    if mask_function is bidirectional_mask_function:
        return Mask("bidirectional")
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    if len(parts) == 2 and parts[1] is causal_mask_function:
        window = inspect.getclosurevars(parts[0]).nonlocals.get("sliding_window")
        if isinstance(window, int):
            return Mask("causal", window)
    return Mask("explicit")


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Lets `model` and all its parts run with the named attention; what was set before comes back afterwards."""
    # Not of PreTrainedModels alone: IDEFICS' vision encoder is none and has a configuration of its own.
    found = (getattr(part, "config", None) for part in model.modules())
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            # Set directly: set_attn_implementation() refuses names for models that it believes to be eager-only (Gemma 2).
            config._attn_implementation_internal = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention_mask)
