"""The device side of one decoder state: a row by itself (prefill), and steps of all rows, queued one by one or captured.

A step is: token ids and positions from the rows' state → embed_tokens → decoder → the rows' state → the next tokens. Nothing
in it needs the host, so that the C loop can launch it (see tensorrt_capture): one CUDA graph for each side of a cache that is not
updated in place.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime import _native
from vlm_edge_runtime.errors import DeviceError

from .base import Array
from .cuda_layout import CONTROL, GUARDED, KEPT, MAX_THREADS, RECORD, ROW, STEP
from .cuda_memory import Buffers
from .tensorrt_cache import DeviceCache
from .tensorrt_capture import Decode, Pieces, captured, free_pieces
from .tensorrt_contexts import DecoderPrograms
from .tensorrt_counts import StepCounts
from .tensorrt_graph import buffer_size
from .tensorrt_program import Shape
from .tensorrt_row_run import RowRuns
from .tensorrt_signature import PAST_LENGTHS
from .tensorrt_types import as_taken

SLOTS = 64
"""Steps whose records the ring holds; two are under way at most."""
_KEEP_BLOCKS = 8
_PER_BLOCK = 4096
"""Vocabulary entries of one block that computes exponentials."""


class DecoderSteps:
    """Device memory of `batch` rows, and what runs on it. Not for two threads at once."""

    def __init__(self, programs: DecoderPrograms, batch: int, capacity: int, counts: StepCounts) -> None:
        self.programs, self.batch, self.capacity, self.counts = programs, batch, capacity, counts
        self.signature = signature = programs.signature
        self.device = device = programs.device
        self.table = np.zeros(batch, ROW)
        self.table["pending"] = -1
        self.stride = -(-signature.vocab // 64) * 64  # rows of logits are aligned
        self._blocks = -(-signature.vocab // _PER_BLOCK)
        self._buffers = Buffers(device)
        self._decode: Decode | None = None
        self.rows = RowRuns(self)
        self._token = object()
        self.last_seconds = 0.0
        self.cache = DeviceCache(device, signature, batch)
        try:
            self._ring = device.shared(SLOTS * batch * RECORD.itemsize)
            self._reserve()
        except BaseException:
            self.close()
            raise
        self._records: npt.NDArray[np.void] = self._ring.array.view(RECORD).reshape(SLOTS, batch)

    def _reserve(self) -> None:
        batch, signature, put = self.batch, self.signature, self._buffers.reserve
        put("logits", 4 * batch * self.stride, zeroed=True)
        put("scores", 4 * batch * self.stride)
        put("weights", 8 * batch * self.stride)
        put("partials", 8 * batch * self._blocks)
        put("rows", self.table.nbytes)
        put("control", CONTROL.itemsize)
        put("positions", 8 * batch * max(1, signature.axes))
        put("ids", 8 * batch)
        put("past", 4 * batch)
        for name in signature.states:
            put(name, batch * self.state_bytes(name), zeroed=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return self.cache.nbytes

    def state_bytes(self, name: str) -> int:
        """Bytes of one row of a recurrent state."""
        return buffer_size(self.programs.decoder, name, (1, *(int(size) for size in self.signature.specs[name].shape[1:])))

    def state_address(self, name: str, row: int) -> int:
        return self._buffers.address(name) + row * self.state_bytes(name)

    def get_state(self, row: int, name: str) -> Array:
        """A copy of a row's recurrent state."""
        shape = [int(size) for size in self.signature.specs[name].shape[1:]]
        found = np.empty(shape, self.signature.types[name])
        self.device.download(found, self.state_address(name, row))
        return found

    def put_state(self, row: int, name: str, array: Array) -> None:
        """Sets a row's recurrent state."""
        self.device.upload(self.state_address(name, row), as_taken(name, array, self.signature.types[name]))

    def copy_row(self, row: int, source: DecoderSteps, source_row: int, length: int) -> None:
        """The first entries and the recurrent states of another row."""
        self.cache.copy_entries(row, source.cache, source_row, length)
        for name in self.signature.states:
            self.device.copy(self.state_address(name, row), source.state_address(name, source_row), self.state_bytes(name))

    def reorder(self, sources: Sequence[int]) -> None:
        """Row i becomes what row sources[i] is: entries, states, logits, further outputs of the last step."""
        lengths = [int(length) for length in self.table["length"]]
        shares = [(name, self.state_bytes(name)) for name in self.signature.states] + [("logits", 4 * self.stride)]
        if self._decode is not None:
            shares += [(f"kept {name}", size // self.batch) for name, size in self._output_bytes(self._decode).items()]
        largest = max(self.cache.largest_tensor, *(self.batch * size for _, size in shares))
        scratch = self.rows.buffers.reserve("scratch", largest)
        self.cache.reorder(sources, lengths, scratch)
        for name, size in shares:
            base = self._buffers.address(name)
            for row, source in enumerate(sources):
                self.device.copy(scratch + row * size, base + source * size, size)
            self.device.copy(base, scratch, self.batch * size)

    def logits_address(self, row: int) -> int:
        """Where a row's next-token logits are, float32 [vocab]."""
        return self._buffers.address("logits") + 4 * row * self.stride

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """A copy of a row's next-token logits."""
        found = np.empty(self.signature.vocab, np.float32)
        self.device.download(found, self.logits_address(row))
        return found

    def all_logits(self) -> npt.NDArray[np.float32]:
        """A copy of every row's next-token logits, float32 [batch, vocab]."""
        found = np.empty((self.batch, self.stride), np.float32)
        self.device.download(found, self.logits_address(0))
        return np.ascontiguousarray(found[:, : self.signature.vocab])

    # --- steps of all rows ---

    def set_inputs(self, feeds: Mapping[str, Array]) -> None:
        """Static inputs and values of generated tokens, [batch, …] each. New shapes end what was captured."""
        types = self.signature.types
        arrays = {name: as_taken(name, array, types[name]) for name, array in feeds.items() if name in types}
        for name, array in arrays.items():
            self._buffers.put(name, array)
        shapes: dict[str, Shape] = {name: array.shape for name, array in arrays.items()}
        shapes["inputs_embeds"] = (self.batch, 1, self.signature.hidden)
        if self.signature.axes:
            shapes["position_ids"] = (self.batch, 1) if self.signature.axes == 1 else (self.signature.axes, self.batch, 1)
        if PAST_LENGTHS in types:
            shapes[PAST_LENGTHS] = (self.batch,)
        for name in (*(spec.past for spec in self.signature.caches), *self.signature.states):
            shapes[name] = (self.batch, *map(int, self.signature.specs[name].shape[1:]))
        embed = self.programs.fixed("embed_tokens", {self.programs.ids.name: (self.batch, 1)})
        decoder = self.programs.fixed("decoder", shapes)
        known = self._decode
        if (
            known is not None
            and known.decoder is decoder
            and known.embed is embed
            and known.generation == self._buffers.generation
        ):
            return
        self._forget_graphs()
        outputs = {spec.name: decoder.context.output_shape(spec.name) for spec in self.signature.further}
        self._decode = Decode(embed, decoder, 0, outputs)
        self._lay_out(self._decode)
        self._decode.generation = self._buffers.generation

    def _output_bytes(self, decode: Decode) -> dict[str, int]:
        return {name: buffer_size(self.programs.decoder, name, shape) for name, shape in decode.outputs.items()}

    def _lay_out(self, decode: Decode) -> None:
        """The tables that the kernels read: what rows keep of a step, the guarded entries, and a Step for each side."""
        batch, vocab, put = self.batch, self.signature.vocab, self._buffers.reserve
        outputs = self._output_bytes(decode)
        kept = [
            (put("step logits", 4 * batch * vocab), 4 * vocab, put("logits", 4 * batch * self.stride), 4 * self.stride, 4 * vocab)
        ]
        for name, following in self.signature.states.items():
            size = self.state_bytes(name)
            kept.append((put(following, batch * size), size, put(name, batch * size), size, size))
        for name, size in outputs.items():
            share = size // batch
            kept.append((put(f"step {name}", size), share, put(f"kept {name}", size), share, share))
        put("embeds", buffer_size(self.programs.embed, self.programs.embeds.name, (batch, 1, self.signature.hidden)))
        # Idle rows write behind their last entry; only a row that fills the engine's cache has none behind.
        guards = len(self.cache.specs) if self.capacity >= self.cache.bucket else 0
        saves = [put(f"save {spec.past}", batch * spec.heads * spec.entry) for spec in self.cache.specs[:guards]]
        put("kept", len(kept) * KEPT.itemsize)
        for side in range(self.cache.sides):
            put(f"guarded {side}", max(guards, 1) * GUARDED.itemsize)
            put(f"step {side}", STEP.itemsize)
        self._buffers.put("kept", np.array(kept, KEPT))
        for side in range(self.cache.sides):
            entries = [
                (self.cache.past(i, side), self.cache.present(i, side), saves[i], spec.heads, spec.entry)
                for i, spec in enumerate(self.cache.specs[:guards])
            ]
            self._buffers.put(f"guarded {side}", np.array(entries or [(0,) * 5], GUARDED))
            self._buffers.put(f"step {side}", self._step(side, len(kept), guards))

    def _step(self, side: int, kept: int, guards: int) -> npt.NDArray[np.void]:
        step = np.zeros(1, STEP)
        one, at = step[0], self._buffers.address
        for name in ("rows", "control", "logits", "scores", "weights", "partials", "ids", "positions", "kept"):
            one[name] = at(name)
        one["guarded"] = at(f"guarded {side}")
        one["past"] = at("past") if PAST_LENGTHS in self.signature.types else 0
        one["ring"] = self._ring.address
        one["stride"], one["batch"], one["vocab"] = self.stride, self.batch, self.signature.vocab
        one["capacity"], one["bucket"] = self.capacity, self.cache.bucket or np.iinfo(np.int32).max
        one["axes"], one["slots"], one["blocks"] = self.signature.axes, SLOTS, self._blocks
        one["wide_ids"] = self.programs.ids.dtype == "int64"
        one["wide_positions"] = self.signature.types.get("position_ids") == "int64"
        one["kept_count"], one["guarded_count"] = kept, guards
        return step

    def step(self, *, forward: bool, sample: bool) -> npt.NDArray[np.void]:
        """Runs the rows that the table marks, and samples those that it marks, queued one by one. The rows' records [batch]."""
        begin = time.perf_counter()
        self._send_table()
        side = self.cache.side
        if forward:
            self._enqueue_step(side, sample=sample)
        else:
            self._launch("vlm_begin", side, (1, 1), 32)
            self._enqueue_sampling(side)
        self._fetch_table()
        if forward:  # not where it failed: then the other side holds nothing that counts
            self.cache.side = (side + 1) % self.cache.sides
            self._now.warm.add(side)
            self.counts.queued += 1
        self.last_seconds = time.perf_counter() - begin
        records: npt.NDArray[np.void] = self._records[0].copy()
        return records

    def run_captured(self, loop: _native.CudaLoop, steps: int) -> npt.NDArray[np.void]:
        """Up to `steps` captured steps, with the interpreter lock released: their records [done, batch]."""
        graphs = self._graphs()
        begin = time.perf_counter()
        self._send_table()
        events, side = self.device.events, self.cache.side
        ring = self._ring.array.ctypes.data
        data, launched = loop.run(self.device.stream, events, graphs, side, ring, SLOTS, self.batch, 0, steps)
        self.cache.side = (side + launched) % self.cache.sides
        self.counts.captured += launched
        self._fetch_table()
        records: npt.NDArray[np.void] = np.frombuffer(data, RECORD).reshape(-1, self.batch)
        self.last_seconds = (time.perf_counter() - begin) / max(1, len(records))
        return records

    @property
    def ready(self) -> bool:
        """Whether `set_inputs` was called."""
        return self._decode is not None

    @property
    def can_capture(self) -> bool:
        """Whether steps of the present shapes run as captured graphs: each side ran once, and TensorRT and CUDA allow it.

        Where they do not, steps are queued one by one, and `StepCounts` says why.
        """
        decode = self._now
        if len(decode.warm) < self.cache.sides or self.counts.not_captured_because:
            return False
        for bound, role in ((decode.embed, "embed_tokens"), (decode.decoder, "decoder")):
            if not bound.context.capturable(self.device.stream):
                self.counts.not_captured_because = f"the engine of graph '{role}' cannot be captured"
                return False
        try:
            self._graphs()
        except DeviceError as error:
            self.counts.not_captured_because = str(error)
        return not self.counts.not_captured_because

    def kept_output(self, name: str, row: int) -> Array:
        """A row's share of a further output of the last step that it ran in, without batch; sizes are the step's."""
        decode = self._now
        shape = decode.outputs[name]
        found = np.empty(shape[1:], self.signature.types[name])
        base = self._buffers.address(f"kept {name}")
        self.device.download(found, base + row * found.nbytes)
        return found

    @property
    def _now(self) -> Decode:
        assert self._decode is not None, "set_inputs comes first"
        return self._decode

    def _graphs(self) -> tuple[Pieces, Pieces]:
        decode = self._now
        for side in range(self.cache.sides):
            if side not in decode.graphs:
                decode.graphs[side] = self._capture(side)
        return decode.graphs[0], decode.graphs[self.cache.sides - 1]

    def _capture(self, side: int) -> Pieces:
        """What the C loop launches for a step: one graph, or graphs around the runs that cannot be captured from outside."""
        self._bind(side)
        runs = [run for bound in (self._now.embed, self._now.decoder) for run in bound.context.frozen()]
        if not runs:
            return (captured(self.device, lambda: self._enqueue_step(side, sample=True)),)
        before = captured(self.device, lambda: self._enqueue_before(side))
        return before, *runs, captured(self.device, lambda: self._enqueue_after(side, sample=True))

    def _bind(self, side: int) -> None:
        """Sets the contexts' addresses, unless they are this state's and this side's already."""
        decode, at = self._now, self._buffers.address
        owner = (self._token, decode.generation)
        if decode.embed.owner != owner:
            decode.embed.context.set_address(self.programs.ids.name, at("ids"))
            decode.embed.context.set_address(self.programs.embeds.name, at("embeds"))
            decode.embed.owner = owner
        if decode.decoder.owner == (*owner, side):
            return
        bind = decode.decoder.context.set_address
        buffers = {"inputs_embeds": "embeds", "position_ids": "positions", PAST_LENGTHS: "past", "logits": "step logits"}
        buffers |= {name: f"step {name}" for name in decode.outputs}
        caches = {name for spec in self.cache.specs for name in (spec.past, spec.present)}
        for name in self.programs.decoder.tensors.keys() - caches:
            bind(name, at(buffers.get(name, name)))
        for index, spec in enumerate(self.cache.specs):
            bind(spec.past, self.cache.past(index, side))
            bind(spec.present, self.cache.present(index, side))
        decode.decoder.owner = (*owner, side)

    def _enqueue_step(self, side: int, *, sample: bool) -> None:
        decode = self._now
        self._bind(side)
        self._enqueue_before(side)
        decode.embed.context.enqueue(self.device.stream)
        decode.decoder.context.enqueue(self.device.stream)
        self._enqueue_after(side, sample=sample)

    def _enqueue_before(self, side: int) -> None:
        self._launch("vlm_begin", side, (1, 1), 32)
        if self._guarded:
            self._launch("vlm_save_last", side, (len(self.cache.specs), self.batch), 64)

    def _enqueue_after(self, side: int, *, sample: bool) -> None:
        if self._guarded:
            self._launch("vlm_restore_last", side, (len(self.cache.specs), self.batch), 64)
        self._launch("vlm_keep", side, (_KEEP_BLOCKS, self.batch), 256)
        self._launch("vlm_finish", side, (1, 1), 32)
        if sample:
            self._enqueue_sampling(side)

    @property
    def _guarded(self) -> bool:
        return self.capacity >= self.cache.bucket and bool(self.cache.specs)

    def _enqueue_sampling(self, side: int) -> None:
        self._launch("vlm_controls", side, (1, self.batch), MAX_THREADS)
        self._launch("vlm_weights", side, (self._blocks, self.batch), 256)
        self._launch("vlm_choose", side, (1, self.batch), MAX_THREADS)

    def _launch(self, kernel: str, side: int, grid: tuple[int, int], threads: int) -> None:
        self.device.launch(kernel, self._buffers.address(f"step {side}"), grid, threads)

    def _send_table(self) -> None:
        self.device.upload(self._buffers.address("rows"), self.table)
        self.device.zero(self._buffers.address("control"), CONTROL.itemsize)

    def _fetch_table(self) -> None:
        self.device.download(self.table, self._buffers.address("rows"))

    def _forget_graphs(self) -> None:
        if self._decode is not None:
            for pieces in self._decode.graphs.values():
                free_pieces(self.device, pieces)
            self._decode.graphs.clear()

    def renew(self, counts: StepCounts) -> None:
        """As new, for another state: rows empty, what was captured kept."""
        self.counts = counts
        self.table[...] = np.zeros(self.batch, ROW)
        self.table["pending"] = -1
        self.rows.forget()

    def close(self) -> None:
        """Frees all memory. Nothing may be under way."""
        self._forget_graphs()
        self._decode = None
        self.cache.close()
        self._buffers.close()
        self.rows.buffers.close()
        ring = getattr(self, "_ring", None)
        if ring is not None:
            ring.close()
