"""The rows of a decoder on the GPU: `engines.base.DecoderState` over `tensorrt_step.DecoderSteps`.

Tokens are chosen on the device, by captured steps that the C loop launches. What the sampling kernels do not know (the most
likely tokens' log probabilities) goes to the host row by row: its logits are copied, the C sampler chooses, `StepCounts` counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime import _native
from vlm_edge_runtime.errors import ContextLengthError, DeviceError

from .base import Array, DecoderState, RowTokens, SamplingParams
from .cuda_layout import EMITTED, FINISHED, status_text
from .cuda_sampler import on_device
from .decoder_inputs import newest
from .tensorrt_rows import Named, Row, chunk_ends
from .tensorrt_signature import PAST_LENGTHS
from .tensorrt_state_rows import DeviceRows, named_error

_SAMPLER_FIELDS = ("pending", "position", "length")
"""What moves with a row's content; the rest of the table is its sampler's, which stays."""


class TensorRTDecoderState(DeviceRows):
    """A cache of `batch` rows of `capacity` entries on the device. Calls from two threads at once are refused."""

    def bind(self, row: int, inputs: Mapping[str, Array]) -> None:
        """Sets an empty row's static inputs and initial recurrent states."""
        with self._use():
            state = self._row(row)
            bound, sizes = self._inputs.check_bound(inputs)
            if length := self._length(row):
                raise ValueError(f"row {row} has {length} entries: truncate it to 0 before it is bound to other inputs")
            over: list[Row] = []
            for index, other in enumerate(self._rows):
                if other is state or other.bound is None:
                    continue
                if clash := self._inputs.clash((bound, sizes), (other.bound, other.bound_sizes)):
                    if self._length(index) or not other.used:
                        raise ValueError(f"row {row} has {clash}")
                    over.append(other)
            for other in over:  # emptied after use: what it was bound for is done
                other.bound = None
            self._forget(row)
            state.bound = {name: array.copy() for name, array in bound.items()}
            state.bound_sizes, state.used = sizes, False
            self._row_keys[row], self._next_key = self._next_key, self._next_key + 1
            self._empty(row)

    def prefill(self, row: int, inputs_embeds: Array, positions: Array, token_inputs: Mapping[str, Array] | None = None) -> None:
        """Appends `inputs_embeds` float32 [S, hidden] at `positions` int64 [S] or [3, S] to one row."""
        with self._use():
            state, tokens, length = self._row(row), len(inputs_embeds), self._length(row)
            self._check_prefill(row, inputs_embeds, positions)
            values, sizes = self._inputs.check_tokens(token_inputs, tokens, state.sizes)
            if tokens > self.capacity - length:
                raise ContextLengthError(
                    f"the prompt needs {tokens} more entries, the KV cache has {self.capacity - length} left "
                    f"({length} of {self.capacity} used): use a shorter prompt or load with a larger context_length"
                )
            before = {name: self._steps.get_state(row, name) for name in self._programs.signature.states}
            self._forget(row)
            state.sizes = sizes
            start = 0
            try:
                for end in chunk_ends(tokens, self._longest, values.get("block_ids")):
                    part = {name: array[start:end] for name, array in values.items()}
                    self._run_row(row, inputs_embeds[start:end], positions[..., start:end], part)
                    start = end
            except BaseException as error:
                self._table[row]["length"] = length
                for name, array in before.items():
                    self._steps.put_state(row, name, array)
                raise named_error(error) from None
            state.logits_valid = state.used = True
            self._table[row]["position"] = int(positions[..., -1].max()) + 1

    def _check_prefill(self, row: int, embeds: Array, positions: Array) -> None:
        axes = self._programs.signature.axes
        if len(embeds) == 0:
            raise ValueError("there is nothing to prefill")
        if embeds.ndim != 2 or embeds.shape[1] != self._programs.signature.hidden:
            raise ValueError(f"inputs_embeds are {list(embeds.shape)}, the decoder takes [S, {self._programs.signature.hidden}]")
        if positions.shape[-1] != len(embeds):
            raise ValueError(f"{positions.shape[-1]} positions for {len(embeds)} embeddings")
        if axes > 1 and positions.shape != (axes, len(embeds)):
            raise ValueError(f"positions are {list(positions.shape)}, the decoder takes [{axes}, S]")
        self._check_bound(row)

    def _run_row(self, row: int, embeds: Array, positions: Array, values: Named) -> None:
        """One piece of a prefill."""
        state, inputs = self._rows[row], self._inputs
        feeds: Named = {"inputs_embeds": np.asarray(embeds)[None]}
        if self._programs.signature.axes:
            feeds["position_ids"] = positions[..., None, :]
        before = self._length(row) + (len(embeds) - 1 if self._programs.signature.counts_last else 0)
        feeds[PAST_LENGTHS] = np.array([before], np.int32)
        feeds |= {name: inputs.stack(name, [array], state.sizes, front=1) for name, array in values.items()}
        statics = {name: inputs.stack(name, [(state.bound or {})[name]], state.sizes) for name in inputs.static}
        given = self._steps.rows.run(row, feeds, statics, self._row_keys[row])
        self._record("decoder", self._steps.last_seconds, 1)
        self._table[row]["length"] += len(embeds)
        sizes = state.sizes | {"total": self._length(row)}
        state.outputs = {spec.name: newest(spec, given[spec.name], 0, sizes) for spec in self._programs.signature.further}

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """A copy of the row's next-token logits, float32 [vocab]."""
        with self._use():
            self._run_pushed(row)
            return self._fetch_logits(row)

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
            if not state.logits_valid and self._table[row]["pending"] < 0:
                raise ValueError(f"row {row} has no logits: prefill it before start")
            values, sizes = self._inputs.check_tokens(token_inputs, None, state.sizes)
            sampler = _native.Sampler(self._programs.signature.vocab, params)  # which also checks the parameters
            past = np.asarray(history, np.int64)
            entry = self._table[row]
            state.device_sampler.arm(entry, params, past, self.capacity - self._length(row) + 1)
            state.host_sampler = None
            if not on_device(params):
                entry["history"] = entry["seen"] = entry["constrained"] = 0
                state.host_sampler = sampler
                for token in past.tolist():
                    sampler.accept(token)
            state.params = params
            state.token_inputs, state.sizes = values, sizes
            self._inputs_version += bool(self._inputs.tokens)
            entry["position"] = next_position
            state.armed, state.finished = True, False
            self._loop.resume()

    def decode(self, max_steps: int) -> list[RowTokens]:
        """Up to `max_steps` tokens for every unfinished row."""
        if max_steps < 1:
            raise ValueError(f"max_steps is {max_steps}, expected 1 or more")
        with self._use():
            results = [RowTokens(finished=row.finished) for row in self._rows]
            done = 0
            while done < max_steps and not self._loop.cancelled:
                active = [index for index, row in enumerate(self._rows) if row.active]
                pending = [index for index in active if self._table[index]["pending"] >= 0]
                if not active:
                    break
                if any(self._length(index) == self.capacity for index in pending):
                    if done == 0:
                        self._check_room(pending)
                    break
                done += self._advance(active, pending, max_steps - done, results)
            return results

    def _advance(self, active: list[int], pending: list[int], steps: int, results: list[RowTokens]) -> int:
        """Some steps of the active rows; how many."""
        host = [index for index in active if self._rows[index].host_sampler is not None]
        device = [index for index in active if self._rows[index].host_sampler is None]
        self._prepare()
        self._mark(active=device, marked=host)
        lengths = self._table["length"].copy()
        tokens = {index: int(self._table[index]["pending"]) for index in pending}
        try:
            if pending and not host and self._steps.can_capture:
                records = self._steps.run_captured(self._loop, steps)
            else:
                records = self._steps.step(forward=bool(pending), sample=bool(device))[None]
        except DeviceError as error:
            raise named_error(error) from None
        if pending and len(records):
            self._record("decoder", self._steps.last_seconds, len(records))
        self._ran([index for index in range(self.batch) if self._length(index) > lengths[index]], tokens)
        for record in records if device else ():
            for index in device:
                self._take(index, record[index], results[index])
        for index in host:
            self._choose_on_host(index, results[index])
        if not len(records) and not self._loop.cancelled:
            raise DeviceError("the GPU ran no step although rows are open: this is a fault in the engine.")
        return len(records)

    def _take(self, index: int, record: npt.NDArray[np.void], result: RowTokens) -> None:
        row, flags = self._rows[index], int(record["flags"])
        if text := status_text(flags):
            row.tainted = True
            raise DeviceError(self._unusable(index, text))
        if flags & EMITTED:
            self._emit(row, result, int(record["token"]), float(record["logprob"]), [])
        if flags & FINISHED:
            row.finished = result.finished = True

    def _choose_on_host(self, index: int, result: RowTokens) -> None:
        row, logits = self._rows[index], self._fetch_logits(index)
        assert row.host_sampler is not None
        try:
            token, logprob, top = row.host_sampler.choose(logits)
        except DeviceError as error:
            row.tainted = True
            text = str(error).split("contain ", 1)[-1].split(":")[0]
            raise DeviceError(self._unusable(index, text)) from None
        self._steps.counts.host_sampled += 1
        self._table[index]["pending"] = token
        row.pushed = False
        self._emit(row, result, token, logprob, top)
        row.finished = result.finished = token in row.params.eos_token_ids

    def _emit(self, row: Row, result: RowTokens, token: int, logprob: float, top: list[tuple[int, float]]) -> None:
        result.tokens.append(token)
        if row.params.logprobs >= 0:
            result.logprobs.append(logprob)
        if row.params.logprobs > 0:
            result.top_logprobs.append(top)

    def _unusable(self, index: int, text: str) -> str:
        where = f"row {index}, entry {self._length(index)}"
        return f"graph 'decoder' computed logits that contain {text} ({where}): there is no next token"

    def push(self, row: int, token: int) -> None:
        """Replaces the row's pending token."""
        with self._use():
            state = self._row(row)
            self._check_token(token)
            if not state.logits_valid and self._table[row]["pending"] < 0:
                raise ValueError(f"row {row} is empty: prefill it before push")
            self._table[row]["pending"] = token
            state.pushed, state.finished = True, False

    def step(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Runs one token of every row as one batch: the logits that follow, float32 [batch, vocab]."""
        with self._use():
            if np.shape(tokens) != (self.batch,):
                raise ValueError(f"tokens has the shape {np.shape(tokens)}, expected ({self.batch},): one for every row")
            for index, (row, token) in enumerate(zip(self._rows, tokens.tolist(), strict=True)):
                self._check_token(token)
                if not row.armed:
                    raise ValueError(f"row {index} was not started: step runs every row")
            everyone = list(range(self.batch))
            self._check_room(everyone)
            before = self._table["pending"].copy()
            self._table["pending"] = tokens
            try:
                self._run_marked(everyone)
            except BaseException:
                self._table["pending"] = before
                raise
            logits = self._steps.all_logits()
            for row, found in zip(self._rows, logits, strict=True):
                row.finished = False
                row.tainted |= bool(np.isnan(found).any())
            return logits

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
            self._steps.reorder(sources)
            for name in _SAMPLER_FIELDS:
                self._table[name] = self._table[name][list(sources)]
            moved = [(one.sizes, one.token_inputs, one.outputs, one.logits_valid, one.pushed, one.finished) for one in origins]
            taints = [origin.tainted or row.tainted for row, origin in zip(self._rows, origins, strict=True)]
            for row, content, tainted in zip(self._rows, moved, taints, strict=True):
                row.sizes, row.token_inputs, row.outputs, row.logits_valid, row.pushed, row.finished = content
                row.tainted = tainted
            self._inputs_version += bool(self._inputs.tokens)

    def outputs(self, row: int) -> dict[str, Array]:
        """The graph's further outputs for the row's newest token, each without batch and sequence."""
        with self._use():
            self._run_pushed(row)
            state = self._rows[row]
            if not state.logits_valid:
                raise ValueError(f"row {row} has no logits: prefill it first")
            return {name: array.copy() for name, array in self._fetch_outputs(row).items()}

    def truncate(self, row: int, length: int) -> None:
        """Forgets a row's entries from `length` on."""
        with self._use():
            state, present = self._row(row), self._length(row)
            if not 0 <= length <= present:
                raise ValueError(f"row {row} has {present} entries: it cannot be truncated to {length}")
            if self._inputs.recurrent and 0 < length < present:
                raise ValueError(
                    f"a decoder with recurrent state cannot be truncated to {length} of {present} entries, only to 0"
                )
            if state.tainted:  # attention weights of 0 times NaN are NaN: entries that are no longer valid must hold numbers
                self._steps.cache.clear(row, length)
                state.tainted = length > 0
            self._forget(row)
            self._table[row]["length"] = length
            if length == 0:
                self._empty(row)

    def copy_prefix(self, row: int, source: DecoderState, source_row: int, length: int) -> None:
        """Makes `row` a copy of the first `length` entries of `source`'s row."""
        if not isinstance(source, TensorRTDecoderState) or source._lock is not self._lock:
            raise ValueError("the source state belongs to another decoder")
        with self._use():
            origin, state = source._row(source_row), self._row(row)
            present = source._length(source_row)
            if not 0 <= length <= present:
                raise ValueError(f"the source row has {present} entries, {length} were asked for")
            if self._inputs.recurrent and 0 < length < present:
                raise ValueError(
                    f"a decoder with recurrent state can only be copied whole ({present} entries), not {length} of them"
                )
            if length > self.capacity:
                raise ContextLengthError(f"{length} entries do not fit a KV cache of {self.capacity}")
            if length:
                self._check_bound(row)
                if state.bound_sizes != origin.bound_sizes:
                    raise ValueError("the rows are bound to inputs of unlike shapes: entries cannot be copied")
            same = source is self and source_row == row
            if length and not same:
                self._steps.copy_row(row, source._steps, source_row, length)
            sizes = origin.sizes
            self._forget(row)
            self._table[row]["length"] = length
            if length == 0:
                self._empty(row)
            else:
                state.sizes, state.used = sizes, True
