"""What every call on a decoder state of the GPU goes through: one call at a time, rows checked, inputs sent, marked rows run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime import _native
from vlm_edge_runtime.errors import ContextLengthError, DeviceError

from .cuda_sampler import RowSampler
from .decoder_inputs import newest
from .tensorrt_contexts import DecoderPrograms
from .tensorrt_counts import StepCounts
from .tensorrt_rows import Named, Row, stacked_inputs
from .tensorrt_step import DecoderSteps


class DeviceRows:
    """The rows of a `TensorRTDecoderState`: their life, and what its calls share."""

    def __init__(
        self,
        programs: DecoderPrograms,
        batch: int,
        capacity: int,
        *,
        lock: threading.RLock,
        counts: StepCounts,
        record: Callable[[str, float, int], None],
        prefill_chunk: int = 0,
    ) -> None:
        self.batch, self.capacity = batch, capacity
        self._programs = programs
        self._inputs = programs.signature.inputs
        self._record = record
        self._steps = _lent(programs, batch, capacity, counts)
        self._table = self._steps.table
        limits = [limit for limit in (prefill_chunk, programs.longest_row) if limit]
        self._longest = min(limits) if limits else None
        bound: Named | None = None if self._inputs.bound else {}
        self._rows = [Row(RowSampler(programs.device, programs.signature.vocab), bound) for _ in range(batch)]
        self._loop = _native.CudaLoop(programs.device.library)
        self._inputs_version = self._sent_version = 0
        self._row_keys = list(range(batch))
        self._next_key = batch
        self._busy, self._lock = threading.Lock(), lock
        self._close_wanted = self._closed = False

    @property
    def lengths(self) -> list[int]:
        """Valid KV entries per row (tokens, where the decoder has no cache)."""
        self._check_open()
        return [int(length) for length in self._table["length"]]

    @property
    def programs(self) -> DecoderPrograms:
        """The engines that it runs on."""
        return self._programs

    @property
    def closed(self) -> bool:
        """Whether its memory is given back."""
        return self._closed

    @property
    def held_entries(self) -> int:
        """Cache entries that each row takes memory for, used or not."""
        return self._steps.cache.bucket * self._steps.cache.sides

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache, all of them on the device from the beginning."""
        return self._steps.nbytes

    def cancel(self) -> None:
        """Makes a running `decode` return after the step that is under way."""
        self._loop.cancel()

    def close(self) -> None:
        """Frees the cache."""
        self._close_wanted = True
        self._loop.cancel()
        if self._busy.acquire(blocking=False):
            try:
                self._close_now()
            finally:
                self._busy.release()

    def _close_now(self) -> None:
        if self._closed:
            return
        self._closed = True
        with self._lock:
            self._programs.device.use()
            self._programs.device.synchronize()
            if any(row.tainted for row in self._rows):  # no later state shall read NaN
                self._steps.close()
            else:
                _given_back(self._programs, self._steps)
            for row in self._rows:
                row.device_sampler.close()

    def _check_open(self) -> None:
        if self._close_wanted:
            raise DeviceError("the decoder state is closed")

    def _use(self) -> Use:
        self._check_open()
        return Use(self)

    def _row(self, row: int) -> Row:
        if not 0 <= row < self.batch:
            raise ValueError(f"row {row} is outside the batch of {self.batch}")
        return self._rows[row]

    def _length(self, row: int) -> int:
        return int(self._table[row]["length"])

    def _check_token(self, token: int) -> None:
        if not 0 <= token < self._programs.signature.vocab:
            raise ValueError(f"token {token} is outside the vocabulary of {self._programs.signature.vocab}")

    def _check_bound(self, row: int) -> None:
        if self._rows[row].bound is None:
            raise ValueError(f"row {row} is not bound: the decoder reads {', '.join(sorted(self._inputs.bound))}")

    def _check_room(self, rows: list[int]) -> None:
        for row in rows:
            if self._length(row) == self.capacity:
                raise ContextLengthError(
                    f"row {row} fills the KV cache's {self.capacity} entries: ask for fewer new tokens or load with a larger "
                    "context_length"
                )

    def _forget(self, row: int) -> None:
        self._rows[row].forget()
        self._table[row]["pending"] = -1
        self._inputs_version += bool(self._inputs.bound or self._inputs.tokens)

    def _empty(self, row: int) -> None:
        """Back to what the row was bound to."""
        state = self._rows[row]
        state.sizes = dict(state.bound_sizes)
        for name in self._inputs.recurrent if state.bound else ():
            self._steps.put_state(row, name, (state.bound or {})[name])

    def _fetch_logits(self, row: int) -> npt.NDArray[np.float32]:
        if not self._row(row).logits_valid:
            raise ValueError(f"row {row} has no logits: prefill it first")
        found = self._steps.logits(row)
        self._rows[row].tainted |= bool(np.isnan(found).any())
        return found

    def _fetch_outputs(self, row: int) -> Named:
        state, steps = self._rows[row], self._steps
        if state.outputs is None:
            sizes = state.sizes | {"total": self._length(row)}
            further = self._programs.signature.further
            state.outputs = {spec.name: newest(spec, steps.kept_output(spec.name, row)[None], 0, sizes) for spec in further}
        return state.outputs

    def _run_pushed(self, row: int) -> None:
        if self._row(row).pushed:
            self._check_room([row])
            self._run_marked([row])

    def _run_marked(self, rows: list[int]) -> None:
        """Runs the pending tokens of these rows; nothing is chosen."""
        self._prepare()
        self._mark(active=[], marked=rows)
        tokens = {row: int(self._table[row]["pending"]) for row in rows}
        try:
            self._steps.step(forward=True, sample=False)
        except DeviceError as error:
            raise named_error(error) from None
        self._record("decoder", self._steps.last_seconds, 1)
        self._ran(rows, tokens)

    def _ran(self, rows: list[int], tokens: Mapping[int, int]) -> None:
        for index in rows:
            row = self._rows[index]
            if row.host_sampler is not None:
                row.host_sampler.accept(tokens[index])
            row.logits_valid = row.used = True
            row.pushed = False
            row.outputs = None

    def _mark(self, *, active: list[int], marked: list[int]) -> None:
        self._table["active"] = self._table["marked"] = 0
        self._table["active"][active] = 1
        self._table["marked"][marked] = 1

    def _prepare(self) -> None:
        """The device has what rows are bound to and what generated tokens have, and contexts of their shapes."""
        if self._steps.ready and self._sent_version == self._inputs_version:
            return
        for index, row in enumerate(self._rows):  # other shapes would overwrite what rows keep on the device
            if row.logits_valid and row.outputs is None:
                self._fetch_outputs(index)
        self._steps.set_inputs(stacked_inputs(self._inputs, self._rows))
        self._sent_version = self._inputs_version


def _lent(programs: DecoderPrograms, batch: int, capacity: int, counts: StepCounts) -> DecoderSteps:
    """Steps of a closed state of the same size, with what was captured for them, or new ones."""
    for at, steps in enumerate(programs.idle):
        if (steps.batch, steps.capacity) == (batch, capacity):
            steps.renew(counts)
            return programs.idle.pop(at)
    return DecoderSteps(programs, batch, capacity, counts)


def _given_back(programs: DecoderPrograms, steps: DecoderSteps) -> None:
    programs.idle.insert(0, steps)
    while len(programs.idle) > programs.keeps_idle:
        programs.idle.pop().close()


def named_error(error: BaseException) -> BaseException:
    """The error with the graph's name before it."""
    if isinstance(error, DeviceError) and not str(error).startswith("graph "):
        return DeviceError(f"graph 'decoder': {error}")
    return error


class Use:
    """Holds a state, and the device, for one call; a second thread's call is refused. Closes what was to be closed meanwhile."""

    def __init__(self, state: DeviceRows) -> None:
        self._state = state

    def __enter__(self) -> None:
        if not self._state._busy.acquire(blocking=False):
            raise DeviceError("the decoder state is in use by another thread: one call at a time")
        self._state._lock.acquire()
        try:
            self._state._programs.device.use()
        except BaseException:
            self._state._lock.release()
            self._state._busy.release()
            raise

    def __exit__(self, *exception: object) -> None:
        self._state._lock.release()
        try:
            if self._state._close_wanted:
                self._state._close_now()
        finally:
            self._state._busy.release()
