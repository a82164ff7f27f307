"""ONNX Runtime's CUDA provider behind the engine interface (`device="cuda"`, builds of backend "ort-cuda").

The token loop is Python and not the C loop of the CPU engine, on purpose. `run_with_iobinding` releases the interpreter lock
for the whole of a run, and bindings made once cost as little per step from Python as from C (26 against 31 µs for the
signature of 30 layers, measured on the CPU provider), so a C loop would buy microseconds. It would need the C API's provider
options, device memory and device copies through hand-numbered slots, none of which a machine without a GPU can try; the
Python API is what ONNX Runtime's users run. What stays C is the sampler, for every rule but plain greedy choice.

Per step of all rows: their positions, lengths and tokens go up in one piece, embedding, decoder and sampler run on one
stream (each a captured CUDA graph where shapes never change), and the chosen tokens come down. Rows with other rules than
plain greedy also fetch their logits.

Environment: VLM_EDGE_CUDA_GRAPH=0 runs every step without CUDA graphs.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence

from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.errors import DeviceError

from .base import Decoder, Engine, EngineOptions, Graph
from .ort_cuda_graphs import OrtGraph
from .ort_cuda_place import Place, cuda_place
from .ort_cuda_state import DeviceGraphs, OrtCudaDecoder
from .portable import PortableDecoder

GRAPH_VARIABLE = "VLM_EDGE_CUDA_GRAPH"
_KEPT_TIMES = 1 << 16
_DECODER_ROLES = ("embed_tokens", "decoder")


def open_engine(bundle: Bundle, options: EngineOptions | None = None) -> Engine:
    """The engine of an ort-cuda build on this machine's GPU. Raises DeviceError with the first thing that is missing."""
    return OrtCudaEngine(bundle, options)


class OrtCudaEngine:
    """Loads the graphs of one build in ONNX Runtime's CUDA provider. No graph runs on the CPU.

    `_place` is for tests: the same code on the CPU provider. `options.threads` and `options.spin` mean nothing here.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions | None = None, *, _place: Place | None = None) -> None:
        self.place = _place or cuda_place(os.environ.get(GRAPH_VARIABLE, "1") != "0")
        self.name = f"onnxruntime-{self.place.memory.device}"
        self.bundle = bundle
        self.options = options or EngineOptions()
        self._graphs: dict[str, OrtGraph] = {}
        self._uncaptured: str | None = None
        self._decoder: OrtCudaDecoder | PortableDecoder | None = None
        self._times: dict[str, deque[float]] = {}
        self._lock = threading.RLock()
        self._closed = False

    def graph(self, role: str) -> Graph:
        """The graph of that role, loaded on first use. Raises BundleError (no such graph) or DeviceError."""
        return self._load(role)

    def decoder(self) -> Decoder:
        """The decoder pair, loaded on first use: over a cache in device memory, or, where the build's cache grows by

        concatenation, through the reference loop, which carries the cache to the host and back.
        """
        with self._lock:
            if self._decoder is None:
                decoder, embed = self._load("decoder"), self._load("embed_tokens")
                kv = self.bundle.kv
                if kv is None or kv.shared_buffer:
                    graphs = DeviceGraphs(decoder, embed, self._uncaptured, self.options.prefill_chunk)
                    self._decoder = OrtCudaDecoder(graphs)
                else:
                    self._decoder = PortableDecoder(decoder, embed)
            return self._decoder

    @property
    def uncaptured(self) -> str | None:
        """Why decode steps are not CUDA graphs, or None when they are."""
        decoder = self.decoder()
        return decoder.uncaptured if isinstance(decoder, OrtCudaDecoder) else "the cache grows at every token"

    def graph_times(self) -> Mapping[str, Sequence[float]]:
        """Seconds of each call so far, per graph role (the newest 65,536).

        A step of the token loop is waited for once, so all of it counts as the decoder's.
        """
        return {role: list(times) for role, times in self._times.items()}

    def close(self) -> None:
        """Frees every session that no state runs on; further calls raise DeviceError."""
        with self._lock:
            self._closed = True
            if self._decoder is not None:
                self._decoder.close()
                self._decoder = None
            for graph in self._graphs.values():
                graph.close()
            self._graphs.clear()

    def _load(self, role: str) -> OrtGraph:
        with self._lock:
            if self._closed:
                raise DeviceError(f"the engine of {self.bundle.path} is closed")
            if role not in self._graphs:
                times = self._times.setdefault(role, deque(maxlen=_KEPT_TIMES))
                path = str(self.bundle.graph_path(role))
                session, reason = self.place.session(path, role, captured=role in _DECODER_ROLES)
                self._uncaptured = self._uncaptured or (reason if role in _DECODER_ROLES else None)
                self._graphs[role] = OrtGraph(self.place, session, role, times.append)
            return self._graphs[role]
