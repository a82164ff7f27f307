"""ONNX Runtime's CUDA provider behind the engine interface (`device="cuda"`, builds of backend "ort-cuda").

Sessions are opened through ONNX Runtime's C API on the engine's own CUDA stream (`user_compute_stream`), and their decoders run
in the GPU loop that TensorRT's run in: cache, tokens, positions and samplers stay on the device, the sampling kernels choose the
next tokens there, and the C loop launches step after step without the interpreter lock. A step is a captured CUDA graph of the
kernels before, the runs of embedding and decoder (`RunWithBinding` over addresses that stay, which ONNX Runtime replays as CUDA
graphs of its own: `enable_cuda_graph`, one `gpu_graph_id` for each set of addresses), and a captured CUDA graph of the kernels
behind.
ONNX Runtime's runs are not captured from outside: a session that captures itself refuses that (onnxruntime#32081), and one that
does not may release host memory that the graph still copies from.

What no machine without a GPU can show, and so nobody has seen yet: what the kernels compute, and how long it takes. The loop, the
bindings and the sessions are tested on the CPU provider, the calls on the CUDA driver over a stand-in for its library. The real
provider library of onnxruntime-gpu 1.31.1 was run over stand-ins for CUDA's libraries, whose kernels do nothing: it takes our
stream and options, captures embedding and decoder on that stream in their third run, and from then on a token is one launch of
each of the two graphs between our own, with no copy and no wait (older versions wait for the stream at each replay).

Environment: VLM_EDGE_CUDA_GRAPH=0 lets ONNX Runtime's runs go without CUDA graphs.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence

from vlm_edge_runtime import _native
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.errors import DeviceError

from .base import Decoder, Engine, EngineOptions, Graph
from .ort_cuda_decoder import OrtCudaDecoder
from .ort_cuda_graphs import OrtGraph
from .ort_cuda_place import Place, cuda_place
from .portable import PortableDecoder
from .tensorrt_counts import StepCounts

GRAPH_VARIABLE = "VLM_EDGE_CUDA_GRAPH"
_KEPT_TIMES = 1 << 16
_DECODER_ROLES = ("embed_tokens", "decoder")


def open_engine(bundle: Bundle, options: EngineOptions | None = None) -> Engine:
    """The engine of an ort-cuda build on this machine's GPU. Raises DeviceError with the first thing that is missing."""
    return OrtCudaEngine(bundle, options)


class OrtCudaEngine:
    """Loads the graphs of one build in ONNX Runtime's CUDA provider. No graph runs on the CPU.

    `_place` is for tests: the same code on the CPU provider. `options.spin`: steps are waited for actively.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions | None = None, *, _place: Place | None = None) -> None:
        self.options = options or EngineOptions()
        self.place = _place or cuda_place(os.environ.get(GRAPH_VARIABLE, "1") != "0", spin=self.options.spin)
        self.name = "onnxruntime-cpu" if self.place.cuda is None else "onnxruntime-cuda"
        self.bundle = bundle
        self._graphs: dict[str, OrtGraph] = {}
        self._sessions: list[_native.Session] = []
        self._decoder: OrtCudaDecoder | PortableDecoder | None = None
        self._times: dict[str, deque[float]] = {}
        self._lock = self.place.lock
        self._closed = False

    def graph(self, role: str) -> Graph:
        """The graph of that role, loaded on first use. Raises BundleError (no such graph) or DeviceError."""
        with self._lock:
            self._check_open()
            if role == "embed_tokens" and self._on_device:
                decoder = self.decoder()
                assert isinstance(decoder, OrtCudaDecoder)
                return decoder.embedding
            if role not in self._graphs:
                session, _ = self.place.session(str(self.bundle.graph_path(role)), role)
                self._graphs[role] = OrtGraph(self.place, session, role, self._recorder(role).append)
            return self._graphs[role]

    def decoder(self) -> Decoder:
        """The decoder pair, loaded on first use: over a cache in device memory, or, where the build's cache grows by

        concatenation, through the reference loop, which carries the cache to the host and back.
        """
        with self._lock:
            self._check_open()
            if self._decoder is None:
                if self._on_device:
                    self._decoder = self._open_decoder()
                else:
                    decoder, embed = self.graph("decoder"), self.graph("embed_tokens")
                    self._decoder = PortableDecoder(decoder, embed)
            return self._decoder

    @property
    def uncaptured(self) -> str | None:
        """Why decode steps are not CUDA graphs, or None when they are."""
        decoder = self.decoder()
        return decoder.uncaptured if isinstance(decoder, OrtCudaDecoder) else "the cache grows at every token"

    @property
    def step_counts(self) -> StepCounts:
        """How decode steps ran so far."""
        return self._decoder.counts if isinstance(self._decoder, OrtCudaDecoder) else StepCounts()

    @property
    def kv_budget(self) -> int:
        """Bytes that KV caches may take: half of what is free on the GPU now."""
        with self._lock:
            self._check_open()
            self.place.device.use()
            return self.place.device.free_memory() // 2

    def graph_times(self) -> Mapping[str, Sequence[float]]:
        """Seconds of each call so far, per graph role (the newest 65,536).

        A step of the token loop is waited for once, so all of it counts as the decoder's.
        """
        return {role: list(times) for role, times in self._times.items()}

    def close(self) -> None:
        """Frees every session, the decoder's states and the stream; further calls raise DeviceError."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._decoder is not None:
                self._decoder.close()
                self._decoder = None
            for graph in self._graphs.values():
                graph.close()
            for session in self._sessions:
                session.close()
            self._graphs.clear()
            self._sessions.clear()
            self.place.device.close()

    @property
    def _on_device(self) -> bool:
        return self.bundle.kv is None or self.bundle.kv.shared_buffer

    def _open_decoder(self) -> OrtCudaDecoder:
        reasons = []
        for role in _DECODER_ROLES:
            session, reason = self.place.session(str(self.bundle.graph_path(role)), role, captured=True)
            self._sessions.append(session)
            self._recorder(role)
            reasons.append(reason)
        embed, decoder = self._sessions
        why = next((reason for reason in reasons if reason), None)
        return OrtCudaDecoder(self.place, decoder, embed, why, times=self._times, prefill_chunk=self.options.prefill_chunk)

    def _recorder(self, role: str) -> deque[float]:
        return self._times.setdefault(role, deque(maxlen=_KEPT_TIMES))

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError(f"the engine of {self.bundle.path} is closed")
