"""The portable graphs as they were exported: past and present grow by concatenation, masks are explicit, the loop is Python.

Slow and simple on purpose: it is the reference that builds are compared with. The token choice is the native sampler's.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime import _native
from vlm_edge_runtime.errors import ContextLengthError, DeviceError

from .base import Array, Decoder, DecoderState, Graph, RowTokens, SamplingParams
from .native_ort import NativeGraph, NativeOrtEngine
from .portable_rows import Named, PortableGraphs, Row, RowGraphs


class PortableDecoderState:
    """`engines.base.DecoderState` over a portable decoder. Calls from two threads at once are refused."""

    def __init__(self, graphs: RowGraphs, batch: int, capacity: int) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(f"batch {batch}, capacity {capacity}: both must be at least 1")
        self.batch = batch
        self.capacity = capacity
        self._graphs = graphs
        needs_binding = bool(graphs.inputs.bound)
        self._rows = [Row(graphs.empty_cache(), None if needs_binding else {}) for _ in range(batch)]
        self._stacked: tuple[list[Named | None], Named] = ([], {})
        self._cancelled = threading.Event()
        self._busy = threading.Lock()
        self._closed = False

    @property
    def lengths(self) -> list[int]:
        """Valid KV entries per row (tokens, where the decoder has no cache)."""
        self._check_open()
        return [row.length for row in self._rows]

    def bind(self, row: int, inputs: Mapping[str, Array]) -> None:
        """Sets an empty row's static inputs and initial recurrent states."""
        with self._use():
            state = self._row(row)
            bound, sizes = self._graphs.inputs.check_bound(inputs)
            if state.length:
                raise ValueError(f"row {row} has {state.length} entries: truncate it to 0 before it is bound to other inputs")
            over: list[Row] = []
            for other in self._rows:
                if other is state or other.bound is None:
                    continue
                if clash := self._graphs.inputs.clash((bound, sizes), (other.bound, other.bound_sizes)):
                    if other.length or not other.used:
                        raise ValueError(f"row {row} has {clash}")
                    over.append(other)
            for other in over:  # emptied after use: what it was bound for is done
                other.bound = None
            state.forget()
            state.bound, state.bound_sizes, state.used = bound, sizes, False
            self._empty(state)

    def prefill(self, row: int, inputs_embeds: Array, positions: Array, token_inputs: Mapping[str, Array] | None = None) -> None:
        """Appends `inputs_embeds` float32 [S, hidden] at `positions` int64 [S] or [3, S] to one row."""
        with self._use():
            state, tokens = self._row(row), len(inputs_embeds)
            if tokens == 0:
                raise ValueError("there is nothing to prefill")
            if positions.shape[-1] != tokens:
                raise ValueError(f"{positions.shape[-1]} positions for {tokens} embeddings")
            self._check_bound(row)
            values, sizes = self._graphs.inputs.check_tokens(token_inputs, tokens, state.sizes)
            if tokens > self.capacity - state.length:
                raise ContextLengthError(
                    f"the prompt needs {tokens} more entries, the KV cache has {self.capacity - state.length} left "
                    f"({state.length} of {self.capacity} used): use a shorter prompt or load with a larger context_length"
                )
            state.forget()
            state.sizes = sizes
            mask = np.ones((1, state.length + tokens), dtype=np.int64)
            given = {name: self._graphs.inputs.stack(name, [array], sizes, front=1) for name, array in values.items()}
            self._graphs.run([state], inputs_embeds[None], mask, positions[..., None, :], given, self._statics([state]))
            state.next_position = int(positions[..., -1].max()) + 1

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """A copy of the row's next-token logits, float32 [vocab]."""
        with self._use():
            return self._newest(row).copy()

    def start(
        self,
        row: int,
        params: SamplingParams,
        history: npt.NDArray[np.int64],
        next_position: int,
        token_inputs: Mapping[str, Array] | None = None,
    ) -> None:
        """Arms a prefilled row for `decode`."""
        with self._use():
            state = self._row(row)
            if state.logits is None and state.pending is None:
                raise ValueError(f"row {row} has no logits: prefill it before start")
            values, sizes = self._graphs.inputs.check_tokens(token_inputs, None, state.sizes)
            sampler = _native.Sampler(self._graphs.vocab_size, params)
            for token in history.tolist():
                sampler.accept(token)
            state.sampler, state.params = sampler, params
            state.token_inputs, state.sizes = values, sizes
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
            self._check_token(token)
            if state.logits is None and state.pending is None:
                raise ValueError(f"row {row} is empty: prefill it before push")
            state.pending, state.pushed, state.finished = token, True, False

    def step(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Runs one token of every row as one batch: the logits that follow, float32 [batch, vocab]."""
        with self._use():
            if np.shape(tokens) != (self.batch,):
                raise ValueError(f"tokens has the shape {np.shape(tokens)}, expected ({self.batch},): one for every row")
            for index, (row, token) in enumerate(zip(self._rows, tokens.tolist(), strict=True)):
                self._check_token(token)
                if not row.armed:
                    raise ValueError(f"row {index} was not started: step runs every row")
            rows = list(range(self.batch))
            self._check_room(rows)
            before = [(row.pending, row.pushed, row.finished) for row in self._rows]
            for row, token in zip(self._rows, tokens.tolist(), strict=True):
                row.pending, row.finished = token, False
            try:
                self._run_pending(rows)
            except BaseException:
                for row, (pending, pushed, finished) in zip(self._rows, before, strict=True):
                    row.pending, row.pushed, row.finished = pending, pushed, finished
                raise
            return np.stack([row.logits for row in self._rows if row.logits is not None])

    def reorder(self, sources: Sequence[int]) -> None:
        """Row `i` becomes what row `sources[i]` was; the samplers stay where they are."""
        with self._use():
            if len(sources) != self.batch:
                raise ValueError(f"{len(sources)} sources for {self.batch} rows")
            origins = [self._row(source) for source in sources]
            for index, (row, origin) in enumerate(zip(self._rows, origins, strict=True)):
                if row.bound_sizes != origin.bound_sizes or (row.bound is None) != (origin.bound is None):
                    raise ValueError(
                        f"rows {index} and {sources[index]} are bound to inputs of unlike shapes: they cannot trade places"
                    )
            self._rows = [
                replace(origin, bound=row.bound, sampler=row.sampler, params=row.params, armed=row.armed, used=row.used)
                for row, origin in zip(self._rows, origins, strict=True)
            ]

    def outputs(self, row: int) -> dict[str, Array]:
        """The graph's further outputs for the row's newest token, each without batch and sequence."""
        with self._use():
            self._newest(row)
            return {name: array.copy() for name, array in self._rows[row].outputs.items()}

    def truncate(self, row: int, length: int) -> None:
        """Forgets a row's entries from `length` on."""
        with self._use():
            state = self._row(row)
            if not 0 <= length <= state.length:
                raise ValueError(f"row {row} has {state.length} entries: it cannot be truncated to {length}")
            if self._graphs.inputs.recurrent and 0 < length < state.length:
                raise ValueError(
                    f"a decoder with recurrent state cannot be truncated to {length} of {state.length} entries, only to 0"
                )
            state.forget()
            if length == 0:
                self._empty(state)
            state.cache = {name: array[:, :, :length] for name, array in state.cache.items()}
            state.length = length

    def copy_prefix(self, row: int, source: DecoderState, source_row: int, length: int) -> None:
        """Makes `row` a copy of the first `length` entries of `source`'s row."""
        if not isinstance(source, PortableDecoderState) or source._graphs is not self._graphs:
            raise ValueError("the source state belongs to another decoder")
        with self._use():
            origin, state = source._row(source_row), self._row(row)
            if not 0 <= length <= origin.length:
                raise ValueError(f"the source row has {origin.length} entries, {length} were asked for")
            if self._graphs.inputs.recurrent and 0 < length < origin.length:
                raise ValueError(
                    f"a decoder with recurrent state can only be copied whole ({origin.length} entries), not {length} of them"
                )
            if length > self.capacity:
                raise ContextLengthError(f"{length} entries do not fit a KV cache of {self.capacity}")
            if length:
                self._check_bound(row)
                if state.bound_sizes != origin.bound_sizes:
                    raise ValueError("the rows are bound to inputs of unlike shapes: entries cannot be copied")
            state.forget()
            if length == 0:
                self._empty(state)
            else:
                state.recurrent, state.sizes, state.used = origin.recurrent, origin.sizes, True
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

    def _row(self, row: int) -> Row:
        self._check_open()
        if not 0 <= row < self.batch:
            raise ValueError(f"row {row} is outside the batch of {self.batch}")
        return self._rows[row]

    def _check_token(self, token: int) -> None:
        if not 0 <= token < self._graphs.vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary of {self._graphs.vocab_size}")

    def _check_bound(self, row: int) -> None:
        if self._rows[row].bound is None:
            raise ValueError(f"row {row} is not bound: the decoder reads {', '.join(sorted(self._graphs.inputs.bound))}")

    def _check_room(self, rows: list[int]) -> None:
        for row in rows:
            if self._rows[row].length == self.capacity:
                raise ContextLengthError(
                    f"row {row} fills the KV cache's {self.capacity} entries: ask for fewer new tokens or load with a larger "
                    "context_length"
                )

    def _empty(self, row: Row) -> None:
        """Back to what the row was bound to."""
        row.sizes = dict(row.bound_sizes)
        row.recurrent = {name: (row.bound or {})[name][None] for name in self._graphs.inputs.recurrent if row.bound}

    def _newest(self, row: int) -> npt.NDArray[np.float32]:
        """The row's next-token logits; a pushed token runs first."""
        state = self._row(row)
        if state.pushed:
            self._check_room([row])
            self._run_pending([row])
        if state.logits is None:
            raise ValueError(f"row {row} has no logits: prefill it first")
        return state.logits

    def _run_pending(self, indices: list[int]) -> None:
        """Runs the pending tokens of these rows as one batch: shorter pasts are padded on the left and masked."""
        rows = [self._rows[index] for index in indices]
        longest = max(row.length for row in rows)
        mask = np.stack([np.arange(longest + 1) >= longest - row.length for row in rows]).astype(np.int64)
        tokens = np.array([row.pending for row in rows], dtype=np.int64)
        positions = np.array([[row.next_position] for row in rows], dtype=np.int64)
        if self._graphs.position_axes > 1:
            positions = np.broadcast_to(positions, (self._graphs.position_axes, *positions.shape))
        inputs = self._graphs.inputs
        sizes = inputs.longest([row.sizes for row in rows])
        values = [
            row.token_inputs if row.token_inputs is not None else inputs.check_tokens(None, None, row.sizes)[0] for row in rows
        ]
        given = {name: inputs.stack(name, [row[name] for row in values], sizes)[:, None] for name in inputs.tokens}
        self._graphs.run(rows, self._graphs.embed(tokens)[:, None], mask, positions, given, self._statics(rows))
        for row in rows:
            if row.sampler is not None and row.pending is not None:
                row.sampler.accept(row.pending)
            row.next_position += 1
            row.pending, row.pushed = None, False

    def _statics(self, rows: list[Row]) -> Named:
        """The rows' static inputs as one batch, kept for the next step of the same rows."""
        key = [row.bound for row in rows]
        if len(key) != len(self._stacked[0]) or any(one is not other for one, other in zip(key, self._stacked[0], strict=True)):
            inputs = self._graphs.inputs
            sizes = inputs.longest([row.bound_sizes for row in rows])
            stacked = {name: inputs.stack(name, [one[name] for one in key if one is not None], sizes) for name in inputs.static}
            self._stacked = key, {name: np.ascontiguousarray(array) for name, array in stacked.items()}
        return self._stacked[1]

    def _emit(self, row: Row, result: RowTokens) -> None:
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

    def __init__(self, decoder: Graph, embed_tokens: Graph) -> None:
        self._graphs = PortableGraphs(decoder, embed_tokens)
        self.hidden_size = self._graphs.hidden_size
        self.vocab_size = self._graphs.vocab_size

    def embed(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Token embeddings: int64 [S] → float32 [S, hidden]."""
        return self._graphs.embed(input_ids)

    def allocate(self, batch: int, capacity: int) -> PortableDecoderState:
        """A new, empty cache, which grows up to `capacity` entries a row."""
        return PortableDecoderState(self._graphs, batch, capacity)

    def close(self) -> None:
        """Frees both sessions."""
        self._graphs.close()


class PortableOrtEngine(NativeOrtEngine):
    """ONNX Runtime's CPU provider on decoders whose cache grows by concatenation: the portable graphs."""

    name = "onnxruntime-cpu-portable"

    def _make_decoder(self, decoder: NativeGraph, embed_tokens: NativeGraph) -> Decoder:
        return PortableDecoder(decoder, embed_tokens)
