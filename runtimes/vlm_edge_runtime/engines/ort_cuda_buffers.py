"""The device memory of one batch of rows, and the runs that are bound to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.errors import DeviceError

from .base import Array
from .ort_cuda_graphs import CacheTensor, DecoderGraphs, run_failed, run_options
from .ort_cuda_memory import aligned

Placed = dict[str, tuple[int, tuple[int, ...]]]
"""Inputs in device memory: name → address and shape."""


class Buffers:
    """KV cache, logits and one step's inputs for `batch` rows of `capacity` entries, allocated once.

    A step's small inputs lie in one piece, `step_inputs`, with a copy on the host: per step that piece goes up, and the
    chosen tokens come down. The bindings of a step hold for its lifetime, unless a further input moves or grows.
    Raises DeviceError when the memory cannot be had or the graph has another batch or capacity.
    """

    def __init__(self, graphs: DecoderGraphs, batch: int, capacity: int, graph_id: int) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(f"batch {batch}, capacity {capacity}: both must be at least 1")
        for cache in graphs.caches:
            for given, fixed, what in zip(
                (batch, capacity), cache.fixed, ("a batch of {} rows", "a cache of {} entries"), strict=True
            ):
                if fixed is not None and fixed != given:
                    raise DeviceError(f"graph 'decoder' has {what.format(fixed)}, asked for were {given}")
        self.graphs, self.batch, self.capacity, self.graph_id = graphs, batch, capacity, graph_id
        self._memory = graphs.place.memory
        rows = (graphs.position_axes, batch) if graphs.position_rank == 3 else (batch,)
        self._pieces = _Pieces()
        self._pieces.add("positions", rows, graphs.types.get("position_ids", "int64"))
        self._pieces.add("seqlens", (batch,), "int32")
        self._pieces.add("ids", (batch,), "int64")
        up = self._pieces.size
        self._pieces.add("chosen", (batch,), "int64")
        self._pieces.add("faults", (batch,), "float32")
        down = self._pieces.size
        self._pieces.add("embedded", (batch, graphs.hidden_size), graphs.embed_type)
        self._pieces.add("embeds", (batch, graphs.hidden_size), graphs.types["inputs_embeds"])
        self._pieces.add("logits", (batch, graphs.vocab_size), graphs.logits_type)
        for cache in graphs.caches:
            self._pieces.add(cache.past, (batch, cache.heads, capacity, cache.width), cache.dtype)
        before = self._pieces.size
        for cache in graphs.caches:
            self._pieces.add(f"spare {cache.past}", (cache.heads, max(capacity, batch), cache.width), cache.dtype)
        if batch == 1:  # nothing trades places and nothing sits a step out
            self._pieces.size = before
        self._base = self._memory.allocate(self._pieces.size)
        self._step_host = np.zeros(up, np.uint8)
        self._result_host = np.zeros(down - up, np.uint8)
        self._result_at = self._base + up
        self.positions = self._pieces.view("positions", self._step_host)
        self.seqlens = self._pieces.view("seqlens", self._step_host)
        self.ids = self._pieces.view("ids", self._step_host)
        self.chosen = self._pieces.view("chosen", self._result_host, up)
        self.faults = self._pieces.view("faults", self._result_host, up)
        self._total = np.zeros(1, np.int32)
        self._grown: dict[str, tuple[int, int]] = {}
        self._step_arrays: dict[str, tuple[Array, tuple[int, tuple[int, ...]]]] = {}
        self._bound: tuple[Placed, list[tuple[Any, Any, str]]] | None = None
        self._captured = graphs.uncaptured is None
        self._no_wait = run_options(graph_id if self._captured else -1, wait=False)
        self._wait = run_options(-1)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache."""
        return sum(cache.row_bytes(self.capacity) for cache in self.graphs.caches) * self.batch

    def address(self, name: str, row: int = 0) -> int:
        """Address of a piece, or of a row of it."""
        return self._base + self._pieces.offset(name) + row * self._pieces.row_bytes(name)

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """The row's logits, float32 [vocab], copied from the device."""
        found = np.empty(self.graphs.vocab_size, self.graphs.logits_type)
        self._memory.download(self.address("logits", row), found)
        return found.astype(np.float32)

    def place_for_step(self, name: str, array: Array) -> tuple[int, tuple[int, ...]]:
        """Copies a further input of all rows to the device, unless it is the array that is there already."""
        before = self._step_arrays.get(name)
        if before is None or before[0] is not array:
            self._step_arrays[name] = array, self._place(f"step {name}", name, array)
        return self._step_arrays[name][1]

    def _place(self, key: str, name: str, array: Array) -> tuple[int, tuple[int, ...]]:
        """Copies an input to the device in the graph's type, into memory that grows as it must."""
        array = np.asarray(array, dtype=self.graphs.types[name], order="C")
        address, room = self._grown.get(key, (0, 0))
        if array.nbytes > room or not address:
            if address:
                self._memory.free(address)
            room = max(array.nbytes, 1)
            address = self._memory.allocate(room)
            self._grown[key] = address, room
        if array.nbytes:
            self._memory.upload(address, array)
        return address, array.shape

    def run_prompt(self, row: int, past: int, embeds: Array, positions: Array, further: Mapping[str, Array]) -> dict[str, Array]:
        """Appends [1, S, hidden] at `positions` [axes, 1, S] or [1, S] behind `past` entries of one row: the host outputs."""
        tokens = embeds.shape[1]
        given = {**further, "inputs_embeds": embeds}
        total = np.array([past + tokens], np.int32)
        if self.graphs.position_rank:
            given["position_ids"] = positions
        if self.graphs.counts_lengths:
            given["seqlens_k"] = total - 1
        placed = {name: self._place(f"prompt {name}", name, array) for name, array in given.items()}
        binding = self._bind_decoder(row, 1, placed, total)
        return self._run_decoder(binding, self._wait)

    def run_step(self, further: Placed) -> dict[str, Array]:
        """Embeds `ids`, runs one token of every row at `positions` behind `seqlens` entries, and chooses the next ones.

        `chosen` and `faults` are filled, the logits stay on the device. Returns the host outputs.
        """
        graphs = self.graphs
        self._total[0] = self.capacity if self._captured else int(self.seqlens.max()) + 1
        self._memory.upload(self._base, self._step_host)
        if self._bound is None or self._bound[0] != further:
            self._bound = further, self._bind_step(further)
        found: dict[str, Array] = {}
        for session, binding, role in self._bound[1]:
            if role == "decoder" and graphs.host_outputs:
                found = self._run_decoder(binding, self._wait)
            else:
                _run(session, binding, role, self._no_wait)
        self._memory.download(self._result_at, self._result_host)
        return found

    def move_entries(self, to: int, source: Buffers, source_row: int, length: int) -> None:
        """Copies the first `length` entries of a row of `source`; row −1 is the spare one."""
        for cache in self.graphs.caches:
            (there, pitch), (here, other) = self._row(cache, to), source._row(cache, source_row)
            self._memory.copy_lines(there, pitch, here, other, length * cache.entry_bytes, cache.heads)

    def keep_last_entry(self, row: int, *, restore: bool) -> None:
        """Puts a full row's last entry aside, or back: a step that it sits out writes there. The spare row has room for one

        of each row.
        """
        for cache in self.graphs.caches:
            (begin, pitch), (spare, other) = self._row(cache, row), self._row(cache, -1)
            last, kept = begin + (self.capacity - 1) * cache.entry_bytes, spare + row * cache.entry_bytes
            if restore:
                self._memory.copy_lines(last, pitch, kept, other, cache.entry_bytes, cache.heads)
            else:
                self._memory.copy_lines(kept, other, last, pitch, cache.entry_bytes, cache.heads)

    def free(self) -> None:
        """Gives the memory back."""
        self._bound = None
        self._memory.free(self._base)
        for address, _ in self._grown.values():
            self._memory.free(address)
        self._grown.clear()

    def _row(self, cache: CacheTensor, row: int) -> tuple[int, int]:
        """Where a row begins, and how far its heads lie apart."""
        if row < 0:
            return self.address(f"spare {cache.past}"), max(self.capacity, self.batch) * cache.entry_bytes
        return self.address(cache.past, row), self.capacity * cache.entry_bytes

    def _bind_step(self, further: Placed) -> list[tuple[Any, Any, str]]:
        """Embedding, its conversion where it needs one, decoder and sampler, each with its binding."""
        graphs, embed = self.graphs, self.graphs.embedding
        embedded = "embeds" if graphs.cast is None else "embedded"
        steps = [self._bind(embed.session, "embed_tokens", {embed.inputs[0].name: "ids"}, {embed.outputs[0].name: embedded})]
        if graphs.cast is not None:
            steps.append(self._bind(graphs.cast, "embeddings", {"given": "embedded"}, {"wanted": "embeds"}))
        placed = further | {"inputs_embeds": (self.address("embeds"), (self.batch, 1, graphs.hidden_size))}
        if graphs.position_rank:
            placed["position_ids"] = self.address("positions"), (*self.positions.shape, 1)
        if graphs.counts_lengths:
            placed["seqlens_k"] = self.address("seqlens"), (self.batch,)
        steps.append((graphs.decoder.session, self._bind_decoder(0, self.batch, placed, self._total), "decoder"))
        steps.append(self._bind(graphs.sampler, "greedy_sampler", {"logits": "logits"}, {"ids": "chosen", "faults": "faults"}))
        return steps

    def _bind(self, session: Any, role: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> tuple[Any, Any, str]:
        """A session's names → pieces [batch, …], bound as [batch, 1, …]."""
        binding, device = session.io_binding(), self._memory.device
        for names, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for name, piece in names.items():
                (rows, *rest), kind = self._pieces.described(piece)
                bind(name, device, 0, kind, (rows, 1, *rest), self.address(piece))
        return session, binding, role

    def _bind_decoder(self, first: int, count: int, placed: Placed, total: Array) -> Any:
        """Rows [first, first + count): the cache in place, so that a present is written where its past lies."""
        graphs, device = self.graphs, self._memory.device
        binding = graphs.decoder.session.io_binding()
        for name, (address, shape) in placed.items():
            binding.bind_input(name, device, 0, np.dtype(graphs.types[name]), shape, address)
        if "total_sequence_length" in graphs.types:  # the kernel reads it on the host
            binding.bind_input("total_sequence_length", "cpu", 0, np.int32, graphs.total_shape, total.ctypes.data)
        for cache in graphs.caches:
            shape, dtype = (count, cache.heads, self.capacity, cache.width), np.dtype(cache.dtype)
            binding.bind_input(cache.past, device, 0, dtype, shape, self.address(cache.past, first))
            binding.bind_output(cache.present, device, 0, dtype, shape, self.address(cache.past, first))
        shape = (count, 1, graphs.vocab_size)
        binding.bind_output("logits", device, 0, np.dtype(graphs.logits_type), shape, self.address("logits", first))
        return binding

    def _run_decoder(self, binding: Any, options: Any) -> dict[str, Array]:
        for name in self.graphs.host_outputs:  # anew for each run: their shapes follow the run's
            binding.bind_output(name, "cpu")
        _run(self.graphs.decoder.session, binding, "decoder", options)
        found = binding.get_outputs()
        names = self.graphs.host_outputs
        arrays = [np.array(value.numpy()) for value in found[len(found) - len(names) :]] if names else []
        return {n: a.astype(np.float32) if a.dtype == np.float16 else a for n, a in zip(names, arrays, strict=True)}


def _run(session: Any, binding: Any, role: str, options: Any) -> None:
    try:
        session.run_with_iobinding(binding, options)
    except Exception as error:  # onnxruntime raises bare Exceptions of its own
        raise run_failed(role, error) from error


class _Pieces:
    """Named arrays, one after another in one allocation."""

    def __init__(self) -> None:
        self.size = 0
        self._found: dict[str, tuple[int, tuple[int, ...], Any]] = {}

    def add(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        kind = np.dtype(dtype)
        self._found[name] = self.size, shape, kind
        self.size += aligned(int(np.prod(shape, dtype=np.int64)) * kind.itemsize)

    def offset(self, name: str) -> int:
        return self._found[name][0]

    def described(self, name: str) -> tuple[tuple[int, ...], Any]:
        return self._found[name][1:]

    def row_bytes(self, name: str) -> int:
        _, shape, kind = self._found[name]
        return int(np.prod(shape[1:], dtype=np.int64)) * int(kind.itemsize)

    def view(self, name: str, memory: Array, begin: int = 0) -> Any:
        """The piece in host memory that is laid out as the allocation from `begin` on."""
        offset, shape, kind = self._found[name]
        count = int(np.prod(shape, dtype=np.int64))
        return memory[offset - begin : offset - begin + count * kind.itemsize].view(kind).reshape(shape)
