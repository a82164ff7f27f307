"""All engines of one build: which graphs need one, which have it already, each compiled and recorded by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from vlm_edge.targets.backend import Job
from vlm_edge_runtime.bundle.engine_files import forget_engines, graph_digest, record_engine, sweep_engines, write_engine
from vlm_edge_runtime.bundle.engine_profile import EngineProfile
from vlm_edge_runtime.bundle.manifest import Build, EngineEntry, FileRef, GenerativeContract, GraphEntry
from vlm_edge_runtime.bundle.reader import check_files, read_manifest
from vlm_edge_runtime.errors import BundleError

from .builder import Engine, compile_engine
from .cache import TimingCache, engine_key
from .profiles import chunk, decoder_profiles, graph_profiles, holds_weights_twice
from .seam import Gpu, Library, has_timing_cache, platform_tag


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
            number: Literal["one", "two"] = "one" if self.job.compiling.profiles == "one" else "two"
            profiles = self._profiles(entry, number)
            asked = {"profiles": self.job.compiling.profiles} if len(profiles) > 1 else {}
            key = engine_key(entry, profiles, self.library, self.sm, asked)
            if self._is_there(key):
                progress.done(step, "unchanged")
                return
            check_files(root, [entry.model, *entry.data])
            made, why = self._compiled(entry, profiles, step), ""
            if len(profiles) > 1 and self.job.compiling.profiles == "auto":
                why = f"{len(profiles)} profiles"
                if holds_weights_twice(made.data.nbytes, weights := _weights(root / entry.model.file)):
                    why = f"1 profile: two hold the {weights / 1e6:.0f} MB of weights twice ({made.data.nbytes / 1e6:.0f} MB)"
                    profiles = self._profiles(entry, "one")
                    made = self._compiled(entry, profiles, step)
            file = write_engine(root, self.build.name, _file_name(name, self.sm), memoryview(made.data))
            record_engine(root, self.build.name, self._entry(name, entry, file, key, profiles, made))
        except BaseException as error:
            progress.failed(step, str(error))
            raise
        remarks = f"{len(made.warnings)} remarks, first: {made.warnings[0][:120]}" if made.warnings else ""
        products = f"{made.layers.products8} products in 8 bits" if made.layers.products8 else ""
        progress.done(step, "; ".join(part for part in (f"{file.bytes / 1e6:.1f} MB", products, why, remarks) if part))

    def _compiled(self, entry: GraphEntry, profiles: Sequence[EngineProfile], step: str) -> Engine:
        timings = None
        if self.gpu is not None and has_timing_cache(self.library):
            timings = TimingCache(self.gpu, self.library, entry)
        path = self.job.bundle.path / entry.model.file
        return compile_engine(
            self.library, path, profiles=profiles, sm=self.sm, timings=timings, progress=self.job.progress, step=step
        )

    def _entry(
        self, name: str, graph: GraphEntry, file: FileRef, key: str, profiles: Sequence[EngineProfile], made: Engine
    ) -> EngineEntry:
        return EngineEntry(
            role=graph.role,
            graph=name,
            file=file,
            sm=list(self.sm),
            builder=self.library.flavour,
            builder_version=self.library.version,
            platform=platform_tag(),
            graph_sha256=graph_digest(graph),
            key=key,
            capacity=_capacity(graph),
            profiles=list(profiles),
            aliases=made.layers.aliases,
        )

    def _profiles(self, entry: GraphEntry, number: Literal["one", "two"]) -> list[EngineProfile]:
        bundle = self.job.bundle
        if entry.role == "decoder":
            capacity = _capacity(entry)
            return decoder_profiles(bundle, entry, capacity=capacity, max_batch=self.max_batch, number=number)
        return graph_profiles(bundle, entry.role, entry, max_batch=self.max_batch, longest=self._longest())

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


def _weights(path: Path) -> int:
    """Bytes of a graph's weights, from its file alone (the weights beside it are not read)."""
    tensors = [value.const_value for value in ir.load(path).graph.initializers.values()]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
