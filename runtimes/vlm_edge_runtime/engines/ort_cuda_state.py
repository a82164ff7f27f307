"""The token loop over a cache in device memory: the portable loop's rules, with another way to run and to keep rows."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.errors import DeviceError

from .base import Array, DecoderState, RowTokens, SamplingParams
from .decoder_inputs import newest
from .ort_cuda_buffers import Buffers
from .ort_cuda_graphs import DecoderGraphs, OrtGraph
from .portable import PortableDecoderState
from .portable_rows import Named, Row

_KEPT_FREE = 2
"""Buffers without a state that are kept for the next one: captured graphs stay with their addresses."""

ON_DEVICE: npt.NDArray[np.float32] = np.empty(0, np.float32)
"""A row's logits that nobody has asked for yet."""


def is_plainly_greedy(params: SamplingParams) -> bool:
    """Whether the largest logit decides alone: then the device chooses, and only the token is copied to the host."""
    return replace(params, seed=0, eos_token_ids=(), top_k=0, top_p=1.0, min_p=0.0) == SamplingParams()


@dataclass(slots=True)
class DeviceRow(Row):
    """A row whose cache is `slot` of `buffers`. `chosen`: what the device's sampler took from the newest logits."""

    buffers: Buffers | None = None
    slot: int = 0
    chosen: int | None = None
    greedy: bool = False

    def forget(self) -> None:
        Row.forget(self)
        self.chosen = None


class DeviceGraphs(DecoderGraphs):
    """DecoderGraphs that run rows of the portable loop, and lend each state its buffers.

    Buffers come back when a state is closed and serve the next one of the same size: what was captured for them stays valid.
    """

    def __init__(self, decoder: OrtGraph, embed: OrtGraph, uncaptured: str | None, prefill_chunk: int) -> None:
        super().__init__(decoder, embed, uncaptured)
        self._chunk = 0 if "block_ids" in self.inputs.tokens else prefill_chunk  # a block that is cut would not see itself whole
        self._free: list[Buffers] = []
        self._numbers = itertools.count(1)

    def lend(self, batch: int, capacity: int) -> Buffers:
        """Buffers of that size, with an empty cache or what a closed state left in it. Raises DeviceError."""
        with self.place.lock:
            for at, buffers in enumerate(self._free):
                if (buffers.batch, buffers.capacity) == (batch, capacity):
                    return self._free.pop(at)
            return Buffers(self, batch, capacity, next(self._numbers))

    def take_back(self, buffers: Buffers) -> None:
        """Keeps the newest buffers that came back, frees older ones."""
        with self.place.lock:
            self._free.insert(0, buffers)
            kept = 0 if self.decoder.closed else _KEPT_FREE
            while len(self._free) > kept:
                self._free.pop().free()

    def close(self) -> None:
        """Refuses further use and frees what is not lent."""
        super().close()
        with self.place.lock:
            while self._free:
                self._free.pop().free()

    def run(
        self,
        rows: Sequence[Row],
        embeds: Array,
        mask: Array,
        positions: Array,
        given: Mapping[str, Array],
        statics: Mapping[str, Array],
    ) -> None:
        """Appends a prompt to one row, in chunks where they are asked for. The cache needs no mask: it is counted."""
        (row,) = rows
        assert isinstance(row, DeviceRow) and row.buffers is not None
        tokens, recurrent = embeds.shape[1], row.recurrent
        chunk = min(self._chunk or tokens, tokens)
        found: dict[str, Array] = {}
        for begin in range(0, tokens, chunk):
            piece = slice(begin, begin + chunk)
            further = {**statics, **recurrent, **{name: array[:, piece] for name, array in given.items()}}
            with self.place.lock:
                start = time.perf_counter()
                found = row.buffers.run_prompt(row.slot, row.length + begin, embeds[:, piece], positions[..., piece], further)
                self.decoder.record(time.perf_counter() - start)
            recurrent = {name: found[present] for name, present in self.presents.items()}
        row.length += tokens
        self.keep(row, found, 0, recurrent)

    def keep(self, row: DeviceRow, found: Mapping[str, Array], at: int, recurrent: Mapping[str, Array]) -> None:
        """Gives a row its share of a run's host outputs."""
        sizes = row.sizes | {"total": row.length}
        row.recurrent = dict(recurrent)
        row.outputs = {spec.name: newest(spec, found[spec.name], at, sizes) for spec in self.further_outputs}
        row.logits, row.used = ON_DEVICE, True


class OrtCudaDecoderState(PortableDecoderState):
    """`engines.base.DecoderState` over buffers on the device. All rows run in every step, so that its shapes never change.

    A row that sits a step out is run behind its last entry, where nothing is valid. Its logits are fetched before.
    """

    def __init__(self, graphs: DeviceGraphs, batch: int, capacity: int) -> None:
        self._buffers = graphs.lend(batch, capacity)
        super().__init__(graphs, batch, capacity)
        self._device = graphs
        self._rows = [self._device_row(row, slot) for slot, row in enumerate(self._rows)]
        self._returned = weakref.finalize(self, graphs.take_back, self._buffers)
        self._returned.atexit = False  # CUDA may be gone by then, and the memory goes with the process

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache on the device."""
        return self._buffers.kv_bytes

    def bind(self, row: int, inputs: Mapping[str, Array]) -> None:
        """Sets an empty row's static inputs and initial recurrent states."""
        super().bind(row, _single(inputs))

    def prefill(self, row: int, inputs_embeds: Array, positions: Array, token_inputs: Mapping[str, Array] | None = None) -> None:
        """Appends `inputs_embeds` float32 [S, hidden] at `positions` int64 [S] or [3, S] to one row."""
        graphs = self._device
        if inputs_embeds.ndim != 2 or inputs_embeds.shape[1] != graphs.hidden_size:
            raise ValueError(f"inputs_embeds have the shape {inputs_embeds.shape}, expected [S, {graphs.hidden_size}]")
        if positions.ndim != 1 + (graphs.position_axes > 1) or positions.shape[:-1] not in ((), (graphs.position_axes,)):
            raise ValueError(f"positions have the shape {positions.shape}, the decoder takes {graphs.position_axes} axes")
        if not graphs.position_rank and graphs.counts_lengths:
            self._check_counted(positions[0], self._row(row).length, "position")
        super().prefill(row, inputs_embeds, positions, _single(token_inputs))

    def start(
        self,
        row: int,
        params: SamplingParams,
        history: npt.NDArray[np.int64],
        next_position: int,
        token_inputs: Mapping[str, Array] | None = None,
    ) -> None:
        """Arms a prefilled row for `decode`."""
        if not self._device.position_rank and self._device.counts_lengths:
            self._check_counted(next_position, self._row(row).length, "next_position")
        super().start(row, params, history, next_position, _single(token_inputs))
        self._slot(row).greedy = is_plainly_greedy(params)
        self._slot(row).chosen = None

    def push(self, row: int, token: int) -> None:
        """Replaces the row's pending token."""
        super().push(row, token)
        self._slot(row).chosen = None

    def step(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Runs one token of every row as one batch: the logits that follow, float32 [batch, vocab]."""
        super().step(tokens)
        with self._use():
            return np.stack([self._newest(row) for row in range(self.batch)])

    def reorder(self, sources: Sequence[int]) -> None:
        """Row `i` becomes what row `sources[i]` was; the samplers stay where they are."""
        with self._use():
            self._fetch_all()
        greedy = [self._slot(row).greedy for row in range(self.batch)]
        super().reorder(sources)
        with self._use(), self._device.place.lock:
            lengths = [row.length for row in self._rows]
            for to, source, owner in moves(sources):
                self._buffers.move_entries(to, self._buffers, source, lengths[owner])
            for slot, row in enumerate(self._rows):
                assert isinstance(row, DeviceRow)
                row.slot, row.chosen, row.greedy = slot, None, greedy[slot]

    def copy_prefix(self, row: int, source: DecoderState, source_row: int, length: int) -> None:
        """Makes `row` a copy of the first `length` entries of `source`'s row."""
        super().copy_prefix(row, source, source_row, length)
        assert isinstance(source, OrtCudaDecoderState)
        same = source is self and source_row == row
        if length and not same:
            with self._use(), self._device.place.lock:
                self._buffers.move_entries(row, source._buffers, source_row, length)

    def close(self) -> None:
        """Gives the buffers back, after the running call."""
        self._cancelled.set()
        with self._busy:
            super().close()
            self._returned()

    def _check_counted(self, position: int, length: int, what: str) -> None:
        if position != length:
            raise ValueError(f"this decoder counts positions itself: {what} {position} does not follow {length} entries")

    def _device_row(self, row: Row, slot: int) -> DeviceRow:
        return DeviceRow(cache={}, bound=row.bound, buffers=self._buffers, slot=slot)

    def _slot(self, row: int) -> DeviceRow:
        found = self._rows[row]
        assert isinstance(found, DeviceRow)
        return found

    def _newest(self, row: int) -> npt.NDArray[np.float32]:
        """The row's next-token logits, fetched when they are asked for."""
        found = super()._newest(row)
        if found is ON_DEVICE:
            with self._device.place.lock:
                found = self._buffers.logits(row)
            self._rows[row].logits = found
        return found

    def _fetch_all(self, but: Sequence[int] = ()) -> None:
        for index, row in enumerate(self._rows):
            if index not in but and row.logits is ON_DEVICE:
                row.logits = self._buffers.logits(index)

    def _emit(self, row: Row, result: RowTokens) -> None:
        assert isinstance(row, DeviceRow)
        if row.chosen is None:
            row.logits = self._newest(row.slot)
            super()._emit(row, result)
            return
        row.pending, row.pushed, row.chosen = row.chosen, False, None
        result.tokens.append(row.pending)
        row.finished = result.finished = row.pending in row.params.eos_token_ids

    def _run_pending(self, indices: list[int]) -> None:
        """Runs the pending tokens of these rows in one step of all rows."""
        buffers, graphs = self._buffers, self._device
        running = set(indices)
        with graphs.place.lock:
            self._fetch_all(but=indices)
            full = []
            for index, row in enumerate(self._rows):
                runs = index in running
                buffers.ids[index] = row.pending if runs else 0
                buffers.seqlens[index] = min(row.length, self.capacity - 1)
                buffers.positions[..., index] = row.next_position if runs else 0
                if not runs and row.length == self.capacity:
                    full.append(index)
                    buffers.keep_last_entry(index, restore=False)
            begin = time.perf_counter()
            try:
                found = buffers.run_step({n: buffers.place_for_step(n, a) for n, a in self._further(indices).items()})
            except BaseException:
                for index in indices:  # their logits on the device may be half written
                    self._rows[index].logits = None if self._rows[index].logits is ON_DEVICE else self._rows[index].logits
                raise
            finally:
                for index in full:
                    buffers.keep_last_entry(index, restore=True)
            graphs.embedding.record(0.0)
            graphs.decoder.record(time.perf_counter() - begin)
        for index in indices:
            self._advance(self._slot(index), found)

    def _advance(self, row: DeviceRow, found: Mapping[str, Array]) -> None:
        """What follows a step for a row that took part."""
        if row.sampler is not None and row.pending is not None:
            row.sampler.accept(row.pending)
        row.length += 1
        row.next_position += 1
        row.pending, row.pushed = None, False
        at, graphs = row.slot, self._device
        graphs.keep(row, found, at, {name: found[present][at : at + 1] for name, present in graphs.presents.items()})
        sound = row.greedy and self._buffers.faults[at] == 0  # otherwise the host's sampler says what is wrong
        row.chosen = int(self._buffers.chosen[at]) if sound else None

    def _further(self, running: list[int]) -> Named:
        """The further inputs of all rows for one token. A row that sits out has its own where it has any, else a neighbour's."""
        inputs = self._device.inputs
        if not (inputs.bound or inputs.tokens):
            return {}
        filler = self._rows[running[0]]
        rows = [row if index in running else filler for index, row in enumerate(self._rows)]
        sizes = inputs.longest([row.sizes for row in rows])
        values = [
            row.token_inputs if row.token_inputs is not None else inputs.check_tokens(None, None, row.sizes)[0] for row in rows
        ]
        found = {name: inputs.stack(name, [one[name] for one in values], sizes)[:, None] for name in inputs.tokens}
        found |= {name: np.concatenate([row.recurrent[name] for row in rows]) for name in inputs.recurrent}
        return {**found, **self._statics(rows)}


def moves(sources: Sequence[int]) -> list[tuple[int, int, int]]:
    """The copies that make row i what row `sources[i]` was: (to, from, the row whose new length counts); −1 is a spare row.

    No row is overwritten while another still needs it; each cycle takes the spare row once.
    """
    waiting = {to: source for to, source in enumerate(sources) if to != source}
    found = []
    while waiting:
        to = next((row for row in waiting if row not in waiting.values()), None)
        if to is None:  # only cycles are left: put one row aside for the one that needs it
            aside = next(iter(waiting))
            needs = next(row for row, source in waiting.items() if source == aside)
            found.append((-1, aside, needs))
            waiting[needs] = -1
            continue
        found.append((to, waiting.pop(to), to))
    return found


def _single(arrays: Mapping[str, Array] | None) -> Mapping[str, Array]:
    """float32 in place of float16, which the checks above do not know."""
    return {name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in (arrays or {}).items()}


class OrtCudaDecoder:
    """A build's `embed_tokens` and `decoder` with the token loop over device memory."""

    def __init__(self, graphs: DeviceGraphs) -> None:
        self._graphs = graphs
        self.hidden_size = graphs.hidden_size
        self.vocab_size = graphs.vocab_size

    @property
    def uncaptured(self) -> str | None:
        """Why decode steps are not CUDA graphs, or None when they are."""
        return self._graphs.uncaptured

    def embed(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Token embeddings: int64 [S] → float32 [S, hidden]."""
        return self._graphs.embed(input_ids)

    def allocate(self, batch: int, capacity: int) -> OrtCudaDecoderState:
        """A new, empty cache on the device. Raises DeviceError when the memory cannot be had."""
        if self._graphs.decoder.closed:
            raise DeviceError("graph 'decoder' is closed")
        return OrtCudaDecoderState(self._graphs, batch, capacity)

    def close(self) -> None:
        """Refuses further use; states go on."""
        self._graphs.close()
