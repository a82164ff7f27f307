"""TensorRT and TensorRT-RTX: the compiled engines of one build on this machine's GPU. Nothing here runs on the CPU instead."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from vlm_edge_runtime.bundle.engine_files import find_engine
from vlm_edge_runtime.bundle.manifest import Build, EngineEntry, TensorSpec
from vlm_edge_runtime.bundle.reader import Bundle, check_files
from vlm_edge_runtime.errors import BundleError, DeviceError, TargetError

from .base import Decoder, EngineOptions
from .cuda_device import CudaDevice, Device
from .tensorrt_counts import StepCounts
from .tensorrt_decoder import TensorRTDecoder
from .tensorrt_graph import TensorRTGraph
from .tensorrt_program import Program
from .tensorrt_seam import MODULES, Runtime, platform_tag

_KEPT_TIMES = 1 << 16
_DECODER = "decoder"


class Loader(Protocol):
    """What turns an engine file into a program: `tensorrt_seam.Runtime`."""

    def check_version(self, built_with: str, where: str, again: str) -> None: ...
    def load(self, path: Path, device: Device, *, key: str, again: str) -> Program: ...


def open_engine(bundle: Bundle, options: EngineOptions | None = None) -> TensorRTEngine:
    """The engine for a build of backend `tensorrt` or `tensorrt-rtx`.

    Raises DeviceError: TensorRT or cuda-bindings not installed, no driver, no GPU, a driver too old.
    """
    build = _build(bundle)
    if build.backend not in MODULES:
        raise DeviceError(f"build '{build.name}' is for the backend '{build.backend}', not for TensorRT.")
    runtime = Runtime("tensorrt-rtx" if build.backend == "tensorrt-rtx" else "tensorrt")
    options = options or EngineOptions()
    device = CudaDevice(spin=options.spin)
    try:
        return TensorRTEngine(bundle, device, runtime, options)
    except BaseException:
        device.close()
        raise


class TensorRTEngine:
    """`engines.base.Engine` over a build's compiled engines, which are loaded when they are first used.

    That all of them are there and made for this GPU and this TensorRT is seen to at once. All graphs and decoder states share one
    GPU stream, and so run one after another.
    """

    def __init__(self, bundle: Bundle, device: Device, runtime: Loader, options: EngineOptions | None = None) -> None:
        self.bundle, self.device, self.options = bundle, device, options or EngineOptions()
        self.build = _build(bundle)
        self.name = self.build.backend
        self._runtime = runtime
        self._again = f"run `vlm-edge build {bundle.path} --target {self.build.target}"
        self._again += "`" if self.build.name == self.build.target else f" --name {self.build.name}`"
        self._graphs: dict[str, TensorRTGraph] = {}
        self._decoder: TensorRTDecoder | None = None
        self._times: dict[str, deque[float]] = {}
        self._lock = threading.RLock()
        self._closed = False
        if not self.build.engines:
            raise DeviceError(
                f"build '{self.build.name}' of {bundle.path} has graphs and no engines yet: {self._again} on this device, which "
                "compiles them."
            )
        self._entries = {graph: self._engine_of(graph) for graph in dict.fromkeys(one.graph for one in self.build.engines)}

    def graph(self, role: str) -> TensorRTGraph:
        """The graph of that role, loaded on first use. Raises BundleError (no such graph) or DeviceError."""
        with self._lock:
            self._check_open()
            if role not in self._graphs:
                program, inputs, outputs = self._program(role, role)
                inputs, outputs = self._published(role, inputs, outputs)
                self._graphs[role] = TensorRTGraph(role, program, self.device, inputs, outputs, self._recorder(role), self._lock)
            return self._graphs[role]

    def decoder(self) -> Decoder:
        """The decoder pair, loaded on first use."""
        with self._lock:
            self._check_open()
            if self._decoder is None:
                entries = [one for one in self.build.engines if one.role == _DECODER]
                if not entries:
                    raise BundleError(
                        f"build '{self.build.name}' of {self.bundle.path} has no engine of a decoder: {self._again}."
                    )
                graphs = {one.capacity: one.graph for one in entries}
                capacities: list[int | None] = [None] if None in graphs else [*sorted(filter(None, graphs))]
                signature = self.bundle.graphs[graphs[capacities[0]]]
                self._recorder(_DECODER)

                def load(capacity: int | None) -> tuple[Program, Sequence[TensorSpec]]:
                    program, inputs, outputs = self._program(_DECODER, graphs[capacity])
                    return program, [*inputs, *outputs]

                self._decoder = TensorRTDecoder(
                    load,
                    capacities,
                    self.graph("embed_tokens"),
                    self.device,
                    self._portable(_DECODER),
                    sizes=(last_size(signature.inputs, "inputs_embeds"), last_size(signature.outputs, "logits")),
                    lock=self._lock,
                    times=self._times,
                    prefill_chunk=self.options.prefill_chunk,
                )
            return self._decoder

    def graph_times(self) -> Mapping[str, Sequence[float]]:
        """Seconds of each call so far, per graph role (the newest 65,536). A decode step counts as one call of the decoder."""
        return {role: list(times) for role, times in self._times.items()}

    @property
    def step_counts(self) -> StepCounts:
        """How decode steps ran so far."""
        return self._decoder.counts if self._decoder is not None else StepCounts()

    @property
    def kv_budget(self) -> int:
        """Bytes that KV caches may take: half of what is free on the GPU now."""
        with self._lock:
            self._check_open()
            self.device.use()
            return self.device.free_memory() // 2

    def close(self) -> None:
        """Frees every engine and the GPU's context; further calls raise DeviceError."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._decoder is not None:
                self._decoder.close()
            for graph in self._graphs.values():
                graph.close()
            self._graphs.clear()
            self._decoder = None
            self.device.close()

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError(f"the engine of {self.bundle.path} is closed")

    def _recorder(self, role: str) -> Callable[[float], None]:
        return self._times.setdefault(role, deque(maxlen=_KEPT_TIMES)).append

    def _portable(self, role: str) -> list[TensorSpec]:
        entry = self.bundle.manifest.graphs.get(role)
        return [] if entry is None else [*entry.inputs, *entry.outputs]

    def _published(
        self, role: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """A graph's signature with the types that callers use: the portable graph's, where it has a tensor of that name."""
        known = {spec.name: spec for spec in self._portable(role)}
        found = [tuple(known.get(spec.name, spec) for spec in specs) for specs in (inputs, outputs)]
        return found[0], found[1]

    def _program(self, role: str, graph: str) -> tuple[Program, Sequence[TensorSpec], Sequence[TensorSpec]]:
        """The loaded engine of one of the build's graphs, and the graph's inputs and outputs."""
        if graph not in self.bundle.graphs:
            raise BundleError(f"{self.bundle.path} has no graph '{role}'; it has: {', '.join(sorted(self.bundle.graphs))}.")
        entry = self._entries.get(graph)
        if entry is None:
            raise DeviceError(
                f"build '{self.build.name}' of {self.bundle.path} has no engine of '{role}': {self._again} on this device."
            )
        self.device.use()
        program = self._runtime.load(self.bundle.path / entry.file.file, self.device, key=entry.key, again=self._again)
        signature = self.bundle.graphs[graph]
        return program, signature.inputs, signature.outputs

    def _engine_of(self, graph: str) -> EngineEntry:
        """The engine of a graph for this GPU, its file there and whole."""
        try:
            entry = find_engine(self.build, graph, sm=self.device.sm, where=self.bundle.path)
        except TargetError as error:
            raise DeviceError(f"{str(error).rstrip('.')} (this machine's GPU is {self.device.name}).") from None
        if entry.platform != platform_tag():
            raise DeviceError(
                f"{entry.file.file} of {self.bundle.path} was built on {entry.platform}, this is {platform_tag()}: {self._again} "
                "on this device."
            )
        self._runtime.check_version(entry.builder_version, entry.file.file, self._again)
        path = self.bundle.path / entry.file.file
        if Path(entry.file.file).is_absolute() or ".." in Path(entry.file.file).parts:
            raise BundleError(f"{self.bundle.path} names an engine outside the bundle ({entry.file.file!r}): refused.")
        if not path.is_file():
            raise DeviceError(f"{path} is missing: {self._again} on this device.")
        try:
            check_files(self.bundle.path, [entry.file], hashes=False)  # whoever opened the bundle has decided on those
        except BundleError as error:
            raise DeviceError(f"{str(error).split(':')[0]}: the engine file is damaged; {self._again} on this device.") from None
        return entry


def last_size(specs: Sequence[TensorSpec], name: str) -> int:
    """The last dimension of a named tensor of a decoder, which must be fixed. Raises DeviceError."""
    found = next((spec.shape[-1] for spec in specs if spec.name == name and spec.shape), None)
    if not isinstance(found, int):
        raise DeviceError(f"the decoder's graph has no tensor '{name}' whose last dimension is fixed: build it again.")
    return found


def _build(bundle: Bundle) -> Build:
    if bundle.build is None:
        raise DeviceError(
            f"the portable graphs of {bundle.path} have no engines: build them for a GPU target (`vlm-edge targets`)."
        )
    return bundle.build
