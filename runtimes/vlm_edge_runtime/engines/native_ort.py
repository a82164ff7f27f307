"""Graphs and plans on the CPU, driven by the C extension, and the decode loop over a shared in-place KV cache."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime import _native
from vlm_edge_runtime.bundle.manifest import TensorSpec
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.errors import DeviceError

from .base import Array, Decoder, DecoderState, EngineOptions, Graph, RowTokens, SamplingParams
from .ort_library import ensure_runtime
from .threads import default_threads

_KEPT_TIMES = 1 << 16

Times = dict[str, deque[float]]


class NativeGraph:
    """One graph in a native session. Outputs are numpy views of ONNX Runtime's own memory, which they keep alive."""

    def __init__(self, session: _native.Session, record: Callable[[float], None]) -> None:
        self.session = session
        self.inputs = _specs(session.inputs)
        self.outputs = _specs(session.outputs)
        self._record = record

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs for the named inputs; nothing is converted but memory order. Raises DeviceError naming the graph."""
        contiguous = {name: np.ascontiguousarray(array) if array.ndim else array for name, array in feeds.items()}
        begin = time.perf_counter()
        outputs = self.session.run(contiguous)
        self._record(time.perf_counter() - begin)
        return {name: np.asarray(tensor) for name, tensor in outputs.items()}

    def close(self) -> None:
        """Frees the session."""
        self.session.close()


class PlanGraph(NativeGraph):
    """The plan of a graph that is no decoder. Outputs are new arrays."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs for the named inputs, each [images, …], or so many rows for each. Raises DeviceError naming the graph."""
        contiguous = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        first, each = self.inputs[0].name, self.session.together
        images = len(contiguous[first]) // each[first] if first in contiguous and contiguous[first].ndim else 0
        lengths = open_sizes(((spec.name, spec.shape) for spec in self.inputs), contiguous)
        outputs = {
            spec.name: np.empty(
                (images * each[spec.name], *(size if isinstance(size, int) else lengths.get(size, 0) for size in spec.shape[1:])),
                spec.dtype,
            )
            for spec in self.outputs
        }
        begin = time.perf_counter()
        _native.graph_run(self.session, contiguous, outputs)
        self._record(time.perf_counter() - begin)
        return outputs


def open_sizes(inputs: Iterable[tuple[str, Sequence[int | str]]], arrays: Mapping[str, Array]) -> dict[str, int]:
    """What the dimensions that have a name, but the first, are in these arrays."""
    return {
        size: array.shape[axis]
        for name, shape in inputs
        if (array := arrays.get(name)) is not None
        for axis, size in enumerate(shape[: array.ndim])
        if axis and isinstance(size, str)
    }


class PlanRows(NativeGraph):
    """The plan of an embedding: a table, of which only the rows of given tokens are read."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The rows of int64 tokens [batch, sequence], float32 [batch, sequence, hidden]. Raises DeviceError naming the graph."""
        tokens = np.ascontiguousarray(feeds[self.inputs[0].name])
        (output,) = self.outputs
        rows = np.empty((*tokens.shape, int(output.shape[-1])), np.float32)
        begin = time.perf_counter()
        _native.rows_run(self.session, tokens, rows)
        self._record(time.perf_counter() - begin)
        return {output.name: rows}


class NativeDecoderState:
    """`engines.base.DecoderState` over `_native.DecoderState`."""

    def __init__(self, native: _native.DecoderState, record: Callable[[_native.DecoderState], None]) -> None:
        self._native = native
        self._record = record
        self.batch = native.batch
        self.capacity = native.capacity

    @property
    def lengths(self) -> list[int]:
        """Valid KV entries per row."""
        return self._native.lengths

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache. Pages are taken from the system when they are first written."""
        return self._native.kv_bytes

    def bind(self, row: int, inputs: Mapping[str, Array]) -> None:
        """Sets an empty row's static inputs and initial recurrent states."""
        self._native.bind(row, _contiguous(inputs))

    def prefill(self, row: int, inputs_embeds: Array, positions: Array, token_inputs: Mapping[str, Array] | None = None) -> None:
        """Appends `inputs_embeds` float32 [S, hidden] at `positions` int64 [S] or [3, S] to one row."""
        embeds, line = np.ascontiguousarray(inputs_embeds), np.ascontiguousarray(positions)
        self._native.prefill(row, embeds, line, _contiguous(token_inputs))
        self._record(self._native)

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """A copy of the row's next-token logits, float32 [vocab]."""
        return np.frombuffer(bytearray(self._native.logits(row)), dtype=np.float32)

    def start(
        self,
        row: int,
        params: SamplingParams,
        history: npt.NDArray[np.int64],
        next_position: int,
        token_inputs: Mapping[str, Array] | None = None,
    ) -> None:
        """Arms a prefilled row for `decode`."""
        past = np.ascontiguousarray(history, dtype=np.int64)
        self._native.start(row, params, past, next_position, _contiguous(token_inputs))

    def decode(self, max_steps: int) -> list[RowTokens]:
        """Up to `max_steps` tokens for every unfinished row."""
        rows = [RowTokens(*row) for row in self._native.decode(max_steps)]
        self._record(self._native)
        return rows

    def verify(self, drafts: Sequence[Sequence[int]]) -> list[RowTokens]:
        """One step for every unfinished row, with tokens that may follow its newest one run together with it."""
        rows = [RowTokens(*row) for row in self._native.verify(drafts)]
        self._record(self._native)
        return rows

    def push(self, row: int, token: int) -> None:
        """Replaces the row's pending token."""
        self._native.push(row, token)

    def step(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Runs one token of every row as one batch: the logits that follow, float32 [batch, vocab]."""
        logits = self._native.step(np.ascontiguousarray(tokens, dtype=np.int64))
        self._record(self._native)
        return np.frombuffer(bytearray(logits), dtype=np.float32).reshape(self.batch, -1)

    def reorder(self, sources: Sequence[int]) -> None:
        """Row `i` becomes what row `sources[i]` was; the samplers stay where they are."""
        self._native.reorder(sources)

    def outputs(self, row: int) -> dict[str, Array]:
        """The graph's further outputs for the row's newest token, each without batch and sequence."""
        found = self._native.outputs(row)
        return {name: np.frombuffer(bytearray(data), dtype=dtype).reshape(shape) for name, (data, dtype, shape) in found.items()}

    def truncate(self, row: int, length: int) -> None:
        """Forgets a row's entries from `length` on."""
        self._native.truncate(row, length)

    def copy_prefix(self, row: int, source: DecoderState, source_row: int, length: int) -> None:
        """Makes `row` a copy of the first `length` entries of `source`'s row."""
        if not isinstance(source, NativeDecoderState):
            raise TypeError(f"cannot copy a prefix from a {type(source).__name__}: it belongs to another engine")
        self._native.copy_prefix(row, source._native, source_row, length)

    def cancel(self) -> None:
        """Makes a running `decode` return after the current step."""
        self._native.cancel()

    def close(self) -> None:
        """Frees the cache."""
        self._native.close()


class NativeDecoder:
    """The `embed_tokens` and `decoder` graphs with the token loop in C."""

    def __init__(self, decoder: NativeGraph, embed_tokens: NativeGraph, times: Times, prefill_chunk: int = 0) -> None:
        self._decoder = decoder
        self._embed = embed_tokens
        self._times = times
        self._prefill_chunk = prefill_chunk
        self.hidden_size = fixed_size(decoder.inputs, "decoder", "inputs_embeds")
        self.vocab_size = fixed_size(decoder.outputs, "decoder", "logits")

    def embed(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Token embeddings: int64 [S] → float32 [S, hidden]."""
        return embed_row(self._embed, input_ids)

    def allocate(self, batch: int, capacity: int) -> NativeDecoderState:
        """A new, empty cache. Raises DeviceError when the memory cannot be had or the graph is not a lowered decoder."""
        state = _native.DecoderState(self._decoder.session, self._embed.session, batch, capacity, self._prefill_chunk)
        return NativeDecoderState(state, self._record)

    def _record(self, state: _native.DecoderState) -> None:
        embed, decoder = state.take_times()
        self._times["embed_tokens"].extend(embed)
        self._times["decoder"].extend(decoder)

    def close(self) -> None:
        """Frees both sessions as soon as no state uses them any more."""
        self._decoder.close()
        self._embed.close()


class NativeOrtEngine:
    """Loads the graphs of one build: plans by native kernels, others in ONNX Runtime's CPU provider, on one thread pool.

    A second engine with another number of threads gets pools of its own. ONNX Runtime is opened only where a graph is no plan;
    raises DeviceError when it is missing or too old.
    """

    name = "onnxruntime-cpu"

    def __init__(self, bundle: Bundle, options: EngineOptions | None = None) -> None:
        if any(entry.format != "plan" for entry in bundle.graphs.values()):
            ensure_runtime()
        self.bundle = bundle
        self.options = options or EngineOptions()
        self.threads = self.options.threads or default_threads()
        self._graphs: dict[str, NativeGraph] = {}
        self._decoder: Decoder | None = None
        self._times: Times = {}
        self._lock = threading.RLock()
        self._closed = False

    def graph(self, role: str) -> Graph:
        """The graph of that role, loaded on first use. Raises BundleError (no such graph) or DeviceError."""
        return self._load(role)

    def decoder(self) -> Decoder:
        """The decoder pair, loaded on first use."""
        with self._lock:
            if self._decoder is None:
                self._decoder = self._make_decoder(self._load("decoder"), self._load("embed_tokens"))
            return self._decoder

    def graph_times(self) -> Mapping[str, Sequence[float]]:
        """Seconds of each call so far, per graph role (the newest 65,536)."""
        return {role: list(times) for role, times in self._times.items()}

    def close(self) -> None:
        """Frees every session; further calls raise DeviceError."""
        with self._lock:
            self._closed = True
            self._decoder = None
            for graph in self._graphs.values():
                graph.close()
            self._graphs.clear()

    def _make_decoder(self, decoder: NativeGraph, embed_tokens: NativeGraph) -> Decoder:
        return NativeDecoder(decoder, embed_tokens, self._times, self.options.prefill_chunk)

    def _load(self, role: str) -> NativeGraph:
        with self._lock:
            if self._closed:
                raise DeviceError(f"the engine of {self.bundle.path} is closed")
            if role not in self._graphs:
                times = self._times.setdefault(role, deque(maxlen=_KEPT_TIMES))
                path, plan = str(self.bundle.graph_path(role)), self.bundle.graphs[role].format == "plan"
                encoder = role not in ("decoder", "embed_tokens")
                threads = self.options.encoder_threads if encoder and self.options.encoder_threads else self.threads
                session = _native.Session(path, role, threads=threads, spin=self.options.spin, plan=plan)
                kind = _PLANS.get(role, PlanGraph) if plan else NativeGraph
                self._graphs[role] = kind(session, times.append)
            return self._graphs[role]


_PLANS: Mapping[str, type[NativeGraph]] = {"decoder": NativeGraph, "embed_tokens": PlanRows}
"""What runs the plan of a role; PlanGraph runs those of others."""


def embed_row(graph: Graph, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Runs an embed_tokens graph on one row: int64 [S] → float32 [S, hidden]. Raises ValueError for another rank."""
    if input_ids.ndim != 1:
        raise ValueError(f"input_ids has {input_ids.ndim} dimensions, expected 1")
    (output,) = graph.outputs
    embeddings = graph.run({graph.inputs[0].name: np.asarray(input_ids, dtype=np.int64)[None]})[output.name]
    return np.asarray(embeddings[0], dtype=np.float32)


def _contiguous(arrays: Mapping[str, Array] | None) -> dict[str, Array]:
    # np.ascontiguousarray would make one dimension of none.
    return {name: np.asarray(array, order="C") for name, array in (arrays or {}).items()}


def fixed_size(specs: Sequence[TensorSpec], graph: str, name: str) -> int:
    """The last dimension of a named tensor, which must be fixed. Raises DeviceError."""
    for spec in specs:
        if spec.name == name and spec.shape and isinstance(spec.shape[-1], int):
            return spec.shape[-1]
    raise DeviceError(
        f"graph '{graph}' has no tensor '{name}' whose last dimension is fixed; it has: {', '.join(s.name for s in specs)}"
    )


def _specs(infos: list[_native.TensorInfo]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in infos)
