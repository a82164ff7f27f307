"""The portable graphs as they were exported: past and present grow by concatenation, masks are explicit, the loop is Python.

Slow and simple on purpose: it is the reference that builds are compared with. The token choice is the native sampler's.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime import _native
from vlm_edge_runtime.errors import ContextLengthError, DeviceError

from .base import Array, Decoder, DecoderState, RowTokens, SamplingParams
from .native_ort import NativeGraph, NativeOrtEngine, embed_row, fixed_size

_PAST = "past_key_values."
Cache = dict[str, Array]
"""Past name → array [batch, kv_heads, entries, head_dim]."""


@dataclass(slots=True)
class _Row:
    """One row's cache (batch 1, no padding) and its place in the token loop."""

    cache: Cache
    length: int = 0
    logits: npt.NDArray[np.float32] | None = None
    pending: int | None = None
    pushed: bool = False
    next_position: int = 0
    sampler: _native.Sampler | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    armed: bool = False
    finished: bool = False

    @property
    def active(self) -> bool:
        return self.armed and not self.finished

    def forget(self) -> None:
        self.logits = None
        self.pending = None
        self.pushed = self.armed = self.finished = False


class PortableDecoderState:
    """`engines.base.DecoderState` over a portable decoder. Calls from two threads at once are refused."""

    def __init__(self, decoder: PortableDecoder, batch: int, capacity: int) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(f"batch {batch}, capacity {capacity}: both must be at least 1")
        self.batch = batch
        self.capacity = capacity
        self._decoder = decoder
        self._rows = [_Row(decoder.empty_cache()) for _ in range(batch)]
        self._cancelled = threading.Event()
        self._busy = threading.Lock()
        self._closed = False

    @property
    def lengths(self) -> list[int]:
        """Valid KV entries per row."""
        self._check_open()
        return [row.length for row in self._rows]

    def prefill(self, row: int, inputs_embeds: Array, positions: Array) -> None:
        """Appends `inputs_embeds` float32 [S, hidden] at `positions` int64 [S] or [3, S] to one row."""
        with self._use():
            state, tokens = self._row(row), len(inputs_embeds)
            if tokens == 0:
                raise ValueError("there is nothing to prefill")
            if positions.shape[-1] != tokens:
                raise ValueError(f"{positions.shape[-1]} positions for {tokens} embeddings")
            if tokens > self.capacity - state.length:
                raise ContextLengthError(
                    f"the prompt needs {tokens} more entries, the KV cache has {self.capacity - state.length} left "
                    f"({state.length} of {self.capacity} used): use a shorter prompt or load with a larger context_length"
                )
            state.forget()
            mask = np.ones((1, state.length + tokens), dtype=np.int64)
            logits, state.cache = self._decoder.step(inputs_embeds[None], mask, positions[..., None, :], state.cache)
            state.length += tokens
            state.logits = logits[0]
            state.next_position = int(positions[..., -1].max()) + 1

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """A copy of the row's next-token logits, float32 [vocab]."""
        with self._use():
            state = self._row(row)
            if state.pushed:
                self._check_room([row])
                self._run_pending([row])
            if state.logits is None:
                raise ValueError(f"row {row} has no logits: prefill it first")
            return state.logits.copy()

    def start(self, row: int, params: SamplingParams, history: npt.NDArray[np.int64], next_position: int) -> None:
        """Arms a prefilled row for `decode`."""
        with self._use():
            state = self._row(row)
            if state.logits is None and state.pending is None:
                raise ValueError(f"row {row} has no logits: prefill it before start")
            state.sampler = _native.Sampler(self._decoder.vocab_size, params)
            for token in history.tolist():
                state.sampler.accept(token)
            state.params = params
            state.next_position = next_position
            state.armed, state.finished = True, False
            self._cancelled.clear()

    def decode(self, max_steps: int) -> list[RowTokens]:
        """Up to `max_steps` tokens for every unfinished row."""
        if max_steps < 1:
            raise ValueError(f"max_steps is {max_steps}, expected 1 or more")
        with self._use():
            results = [RowTokens(finished=row.finished) for row in self._rows]
            for step in range(max_steps):
                active = [index for index, row in enumerate(self._rows) if row.active]
                if not active or self._cancelled.is_set():
                    break
                pending = [index for index in active if self._rows[index].pending is not None]
                if any(self._rows[index].length == self.capacity for index in pending):
                    if step == 0:
                        self._check_room(pending)
                    break
                if pending:
                    self._run_pending(pending)
                for index in active:
                    self._emit(self._rows[index], results[index])
            return results

    def push(self, row: int, token: int) -> None:
        """Replaces the row's pending token."""
        with self._use():
            state = self._row(row)
            if not 0 <= token < self._decoder.vocab_size:
                raise ValueError(f"token {token} is outside the vocabulary of {self._decoder.vocab_size}")
            if state.logits is None and state.pending is None:
                raise ValueError(f"row {row} is empty: prefill it before push")
            state.pending, state.pushed, state.finished = token, True, False

    def truncate(self, row: int, length: int) -> None:
        """Forgets a row's entries from `length` on."""
        with self._use():
            state = self._row(row)
            if not 0 <= length <= state.length:
                raise ValueError(f"row {row} has {state.length} entries: it cannot be truncated to {length}")
            state.forget()
            state.cache = {name: array[:, :, :length] for name, array in state.cache.items()}
            state.length = length

    def copy_prefix(self, row: int, source: DecoderState, source_row: int, length: int) -> None:
        """Makes `row` a copy of the first `length` entries of `source`'s row."""
        if not isinstance(source, PortableDecoderState) or source._decoder is not self._decoder:
            raise ValueError("the source state belongs to another decoder")
        with self._use():
            origin, state = source._row(source_row), self._row(row)
            if not 0 <= length <= origin.length:
                raise ValueError(f"the source row has {origin.length} entries, {length} were asked for")
            if length > self.capacity:
                raise ContextLengthError(f"{length} entries do not fit a KV cache of {self.capacity}")
            state.forget()
            state.cache = {name: array[:, :, :length] for name, array in origin.cache.items()}
            state.length = length

    def cancel(self) -> None:
        """Makes a running `decode` return after the current step."""
        self._cancelled.set()

    def close(self) -> None:
        """Frees the cache."""
        self._closed = True
        self._cancelled.set()
        self._rows = []

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError("the decoder state is closed")

    def _use(self) -> _Use:
        self._check_open()
        return _Use(self._busy)

    def _row(self, row: int) -> _Row:
        self._check_open()
        if not 0 <= row < self.batch:
            raise ValueError(f"row {row} is outside the batch of {self.batch}")
        return self._rows[row]

    def _check_room(self, rows: list[int]) -> None:
        for row in rows:
            if self._rows[row].length == self.capacity:
                raise ContextLengthError(
                    f"row {row} fills the KV cache's {self.capacity} entries: ask for fewer new tokens or load with a larger "
                    "context_length"
                )

    def _run_pending(self, indices: list[int]) -> None:
        """Runs the pending tokens of these rows as one batch: shorter pasts are padded on the left and masked."""
        rows = [self._rows[index] for index in indices]
        longest = max(row.length for row in rows)
        mask = np.stack([np.arange(longest + 1) >= longest - row.length for row in rows]).astype(np.int64)
        cache = {
            name: np.concatenate([_pad_left(row.cache[name], longest) for row in rows]) if len(rows) > 1 else rows[0].cache[name]
            for name in rows[0].cache
        }
        tokens = np.array([row.pending for row in rows], dtype=np.int64)
        positions = np.array([[row.next_position] for row in rows], dtype=np.int64)
        if self._decoder.position_axes > 1:
            positions = np.broadcast_to(positions, (self._decoder.position_axes, *positions.shape))
        logits, present = self._decoder.step(self._decoder.embed(tokens)[:, None], mask, positions, cache)
        for at, row in enumerate(rows):
            if row.sampler is not None and row.pending is not None:
                row.sampler.accept(row.pending)
            row.cache = {name: array[at : at + 1, :, longest - row.length :] for name, array in present.items()}
            row.length += 1
            row.next_position += 1
            row.pending, row.pushed = None, False
            row.logits = logits[at]

    def _emit(self, row: _Row, result: RowTokens) -> None:
        assert row.sampler is not None and row.logits is not None  # an armed row without a pending token has both
        token, logprob, top = row.sampler.choose(row.logits)
        row.pending, row.pushed = token, False
        result.tokens.append(token)
        if row.params.logprobs >= 0:
            result.logprobs.append(logprob)
        if row.params.logprobs > 0:
            result.top_logprobs.append(top)
        row.finished = result.finished = token in row.params.eos_token_ids


class _Use:
    """Holds a state for one call; a second thread's call is refused, as the native state does."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise DeviceError("the decoder state is in use by another thread: one call at a time")

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


class PortableDecoder:
    """The portable `embed_tokens` and `decoder` graphs with a token loop in Python."""

    def __init__(self, decoder: NativeGraph, embed_tokens: NativeGraph) -> None:
        self._decoder = decoder
        self._embed = embed_tokens
        self._inputs = {spec.name: spec for spec in decoder.inputs}
        if missing := {"inputs_embeds", "attention_mask"} - self._inputs.keys():
            raise DeviceError(f"graph 'decoder' is not a portable decoder: it has no input {', '.join(sorted(missing))}")
        self.hidden_size = fixed_size(decoder.inputs, "decoder", "inputs_embeds")
        self.vocab_size = fixed_size(decoder.outputs, "decoder", "logits")
        positions = self._inputs.get("position_ids")
        rank3 = positions is not None and len(positions.shape) == 3
        self.position_axes = int(positions.shape[0]) if positions is not None and rank3 else 1

    def embed(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Token embeddings: int64 [S] → float32 [S, hidden]."""
        return embed_row(self._embed, input_ids)

    def allocate(self, batch: int, capacity: int) -> PortableDecoderState:
        """A new, empty cache, which grows up to `capacity` entries a row."""
        return PortableDecoderState(self, batch, capacity)

    def close(self) -> None:
        """Frees both sessions."""
        self._decoder.close()
        self._embed.close()

    def empty_cache(self) -> Cache:
        """A past of no entries for one row."""
        cache: Cache = {}
        for name, spec in self._inputs.items():
            if name.startswith(_PAST):
                _, heads, _, width = spec.shape
                cache[name] = np.empty((1, int(heads), 0, int(width)), dtype=spec.dtype)
        return cache

    def step(self, embeds: Array, mask: Array, positions: Array, cache: Cache) -> tuple[npt.NDArray[np.float32], Cache]:
        """Runs the graph: (last token's logits float32 [batch, vocab], the grown cache)."""
        feeds: Mapping[str, Array] = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **cache}
        outputs = self._decoder.run({name: array for name, array in feeds.items() if name in self._inputs})
        present = {name: outputs[f"present.{name.removeprefix(_PAST)}"] for name in cache}
        return np.asarray(outputs["logits"][:, -1], dtype=np.float32), present


class PortableOrtEngine(NativeOrtEngine):
    """ONNX Runtime's CPU provider on decoders whose cache grows by concatenation: the portable graphs."""

    name = "onnxruntime-cpu-portable"

    def _make_decoder(self, decoder: NativeGraph, embed_tokens: NativeGraph) -> Decoder:
        return PortableDecoder(decoder, embed_tokens)


def _pad_left(array: Array, entries: int) -> Array:
    """[1, heads, n, width] with zero entries in front, so that it has `entries` of them."""
    missing = entries - array.shape[2]
    return np.pad(array, ((0, 0), (0, 0), (missing, 0), (0, 0))) if missing else array
