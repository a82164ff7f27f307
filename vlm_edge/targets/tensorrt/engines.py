"""All engines of one build: which graphs need one, which have it already, each compiled and recorded by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from vlm_edge.targets.backend import Job
from vlm_edge_runtime.bundle.engine_files import forget_engines, graph_digest, record_engine, sweep_engines, write_engine
from vlm_edge_runtime.bundle.engine_profile import EngineProfile
from vlm_edge_runtime.bundle.manifest import Build, EngineEntry, GenerativeContract, GraphEntry
from vlm_edge_runtime.bundle.reader import check_files, read_manifest
from vlm_edge_runtime.errors import BundleError

from .builder import compile_engine
from .cache import TimingCache, engine_key
from .profiles import Weights, chunk, decoder_profiles, graph_profiles
from .seam import Gpu, Library, has_timing_cache, platform_tag

_PRODUCTS = ("MatMul", "Conv", "Gemm")


@dataclass(slots=True)
class EngineMaker:
    """Compiles what a build's graphs have no valid engine for; each is in the bundle before the next begins."""

    job: Job
    build: Build
    library: Library
    sm: tuple[int, ...]
    gpu: Gpu | None
    max_batch: int

    def make_all(self) -> Build:
        """The build with its engines. Whatever interrupts it, those that were finished stay."""
        root, label = self.job.bundle.path, self.build.name
        sweep_engines(root, self.build)
        graphs = self._graphs()
        stale = [one.file.file for one in self.build.engines if one.graph not in graphs or self._is_stale(one, graphs[one.graph])]
        if stale:
            forget_engines(root, label, stale)
        for name, entry in graphs.items():
            self._make(name, entry)
        made = read_manifest(root).builds[label]
        sweep_engines(root, made)
        return made

    def _graphs(self) -> dict[str, GraphEntry]:
        """The build's graphs, and the portable ones that it took unchanged."""
        covered = {entry.role for entry in self.build.graphs.values()}
        plain = {role: entry for role, entry in self.job.bundle.manifest.graphs.items() if role not in covered}
        return plain | self.build.graphs

    def _is_stale(self, engine: EngineEntry, graph: GraphEntry) -> bool:
        return engine.graph_sha256 != graph_digest(graph)

    def _make(self, name: str, entry: GraphEntry) -> None:
        root, progress = self.job.bundle.path, self.job.progress
        step = f"engine {name} (SM {', '.join(map(str, self.sm))})"
        progress.start(step, 1.0)
        try:
            profiles, why = self._profiles(entry)
            settings: Mapping[str, Any] = {}
            key = engine_key(entry, profiles, self.library, self.sm, settings)
            if self._is_there(key):
                progress.done(step, "unchanged")
                return
            check_files(root, [entry.model, *entry.data])
            timings = None
            if self.gpu is not None and has_timing_cache(self.library):
                timings = TimingCache(self.gpu, self.library, entry)
            path = root / entry.model.file
            made = compile_engine(
                self.library, path, profiles=profiles, sm=self.sm, timings=timings, progress=progress, step=step
            )
            file = write_engine(root, self.build.name, _file_name(name, self.sm), memoryview(made.data))
            record_engine(
                root,
                self.build.name,
                EngineEntry(
                    role=entry.role,
                    graph=name,
                    file=file,
                    sm=list(self.sm),
                    builder=self.library.flavour,
                    builder_version=self.library.version,
                    platform=platform_tag(),
                    graph_sha256=graph_digest(entry),
                    key=key,
                    capacity=_capacity(entry),
                    profiles=list(profiles),
                    aliases=made.layers.aliases,
                ),
            )
        except BaseException as error:
            progress.failed(step, str(error))
            raise
        remarks = f"; {len(made.warnings)} remarks, first: {made.warnings[0][:120]}" if made.warnings else ""
        progress.done(step, f"{file.bytes / 1e6:.1f} MB{f', {why}' if why else ''}{remarks}")

    def _profiles(self, entry: GraphEntry) -> tuple[list[EngineProfile], str]:
        bundle, device = self.job.bundle, self.job.target.gpu()[0]
        capacity = _capacity(entry)
        if entry.role == "decoder":
            found, why = decoder_profiles(
                bundle,
                entry,
                capacity=capacity,
                max_batch=self.max_batch,
                weights=_weights(bundle.path / entry.model.file),
                flavour=self.library.flavour,
                usable_bytes=device.usable_bytes,
                wanted=self.job.compiling.profiles,
            )
            return found, f"{len(found)} profile{'s' if len(found) > 1 else ''}: {why}"
        return graph_profiles(bundle, entry.role, entry, max_batch=self.max_batch, longest=self._longest()), ""

    def _longest(self) -> int:
        """Tokens of the longest cache; where there is none, what the model can attend to, but not more than a chunk."""
        sizes = [size for entry in self.build.graphs.values() if (size := _capacity(entry)) is not None]
        contract = self.job.bundle.manifest.contract
        return max(sizes, default=chunk(contract, None) if isinstance(contract, GenerativeContract) else contract.text_length)

    def _is_there(self, key: str) -> bool:
        """Whether the bundle has an engine of that key, whole."""
        for one in read_manifest(self.job.bundle.path).builds[self.build.name].engines:
            if one.key == key:
                try:
                    check_files(self.job.bundle.path, [one.file])
                except BundleError:
                    return False
                return True
        return False


def _file_name(graph: str, sm: Sequence[int]) -> str:
    return f"{graph}.sm{'-'.join(map(str, sm))}.engine"


def _capacity(entry: GraphEntry) -> int | None:
    """Slots of the static cache of a decoder's graph."""
    for spec in entry.inputs:
        if spec.name.startswith("past_key_values.") and len(spec.shape) == 4 and isinstance(spec.shape[2], int):
            return spec.shape[2]
    return None


def _weights(path: Path) -> Weights:
    """What a graph's weights weigh, from its file alone (the weights beside it are not read)."""
    graph = ir.load(path).graph
    total = products = 0
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        total += tensor.nbytes
        if tensor.dtype.is_floating_point() and len(tensor.shape) > 1 and any(u.op_type in _PRODUCTS for u in value.consumers()):
            products += tensor.nbytes
    return Weights(total=total, float_products=products)
