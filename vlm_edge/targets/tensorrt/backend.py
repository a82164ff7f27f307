"""The backend of TensorRT and TensorRT-RTX: graphs checked against what it imports, then engines, each kept by its key."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import onnx_ir as ir

from vlm_edge.passes.half_twin import half_twin
from vlm_edge.passes.strong_types import TYPED
from vlm_edge.quantize.qdq_fold import FoldWeights
from vlm_edge.targets.backend import Backend, Job, Option, checked
from vlm_edge.targets.pipeline import Lowered
from vlm_edge.targets.precision import resolve_precision, stored_as
from vlm_edge.targets.prompts import decoder_feeds
from vlm_edge.targets.selfcheck import Difference
from vlm_edge.targets.target import Options
from vlm_edge_runtime.bundle.engine_files import ENGINES, graph_digest
from vlm_edge_runtime.bundle.manifest import Build, GenerativeContract, GraphEntry, KVLayout
from vlm_edge_runtime.bundle.writer import BuildWriter
from vlm_edge_runtime.errors import BundleError, TargetError

from . import pipeline
from .engines import EngineMaker
from .exactness import exact_difference
from .profiles import buckets
from .seam import Library, NotHere, check_sm, load_library, local_gpu

_LOWERING = "lowered_from"


class TensorRTBackend(Backend):
    """One graph per role and one per context bucket of a decoder; engines for the compute capabilities that are asked for.

    Where the engines cannot be compiled on this machine (a Jetson's, seen from a desktop) the graphs are made and checked, and
    the same command on the device goes on from them.
    """

    block_size: ClassVar[int] = 128

    def __init__(self) -> None:
        self._sm: tuple[int, ...] = ()
        self._buckets: list[int] = []
        self._library: Library | None = None
        self._elsewhere = ""
        self._exact: set[str] = set()
        self._calibrated_on = ""

    def check(self, job: Job) -> None:
        """Finds the builder and what it compiles for. Raises TargetError where it should be here and is not, or does not fit."""
        _, context = job.target.gpu()
        self._start(job, job.compiling.sm)
        contract = job.bundle.manifest.contract
        if isinstance(contract, GenerativeContract) and contract.kv.layers:
            self._buckets = buckets(contract, job.compiling.context or context.buckets)
            job.options["context"] = ",".join(map(str, self._buckets))
        job.options["max_batch"] = _positive(job.compiling.max_batch, context.max_batch)
        job.options[_LOWERING] = _lowered_from(job)

    def _start(self, job: Job, sm: tuple[int, ...] | None) -> None:
        device, _ = job.target.gpu()
        self._sm = check_sm(job.target, device.sm if sm is None else sm)
        if not job.compiling.make:
            self._elsewhere = "as asked; the same command without --no-engines makes them"
            return
        gpu = local_gpu()
        try:
            self._library = load_library(job.target, self._sm, gpu=gpu)
        except NotHere as reason:
            self._elsewhere = str(reason)

    def lower(self, job: Job, role: str) -> Mapping[str, Lowered]:
        """See `Backend.lower`; a decoder with a cache becomes one graph per context bucket."""
        capacities: dict[str, int | None] = {role: None}
        if job.kinds[role] == "decoder" and self._buckets:
            capacities = {f"{role}.c{size}": size for size in self._buckets}
        thresholds = self._thresholds(job, role)
        found: dict[str, Lowered] = {}
        for name, capacity in capacities.items():
            found[name] = pipeline.lower(
                job.bundle,
                role,
                job.kinds[role],
                job.words,
                job.target,
                capacity=capacity,
                block_size=job.block_size,
                calibration=job.calibration(role),
                thresholds=thresholds,
            )
        return found

    def _thresholds(self, job: Job, role: str) -> dict[str, float] | None:
        """Activation ranges of a decoder in int8; the same for all its capacities."""
        if job.kinds[role] != "decoder" or stored_as("decoder", job.words[role], job.target.backend) != "int8":
            return None
        feeds = decoder_feeds(job.bundle, job.pictures)
        count = len(job.pictures)
        shown = f"{count} picture{'s' * (count != 1)}" if count else "drawn pictures"
        self._calibrated_on = f"{len(feeds)} answers on {shown}"
        return pipeline.decoder_thresholds(job.bundle, role, job.target, feeds)

    def compare(self, job: Job, role: str, built: Path) -> Difference:
        """Against the portable graph on the CPU; of a half-precision or quantised graph, what a GPU would compute."""
        model = ir.load(built)
        if TYPED not in model.metadata_props:
            return super().compare(job, role, built)
        self._check_passes(job, role)
        with tempfile.TemporaryDirectory(prefix="vlm-edge-witness-") as folder:
            witness = Path(folder) / built.name
            FoldWeights().apply(model)
            ir.save(half_twin(model), witness, external_data=f"{witness.name}.data")
            return super().compare(job, role, witness)

    def _check_passes(self, job: Job, role: str) -> None:
        """Whether the passes alone change what the graph computes, before types blur it; once for all capacities."""
        if role not in self._exact:
            self._exact.add(role)
            kind, device = job.kinds[role], job.target.gpu()[0]
            capacity = self._buckets[0] if kind == "decoder" and self._buckets else None
            difference = exact_difference(job.bundle, role, kind, device, job.samples, capacity=capacity)
            checked(difference, job, role, exact=True)

    def describe(self, job: Job, role: str, entry: GraphEntry) -> tuple[dict[str, Option], str]:
        """Whether the cache is written in place, and what activations were calibrated on."""
        options: dict[str, Option] = {}
        remarks = []
        if any(spec.name.startswith("past_key_values.") for spec in entry.inputs):
            where = "in place" if _in_place(job) else "double buffer"
            options[f"{role}.kv_cache"] = where
            remarks.append(f"cache {where}")
        if job.kinds[role] == "decoder" and self._calibrated_on:
            options[f"{role}.calibrated_on"] = self._calibrated_on
            remarks.append(f"int8 activations from {self._calibrated_on}")
        return options, "; ".join(remarks)

    def kv(self, job: Job, graphs: Mapping[str, GraphEntry]) -> KVLayout | None:
        """The cache in the decoder's type, of static capacity; one buffer where the target updates it in place."""
        layout = job.bundle.kv
        decoder = next((entry for entry in graphs.values() if entry.role == "decoder"), None)
        if layout is None or decoder is None:
            return layout
        dtype = next((spec.dtype for spec in decoder.inputs if spec.name.startswith("past_key_values.")), layout.dtype)
        return msgspec.structs.replace(layout, dtype=dtype, shared_buffer=_in_place(job) or not layout.layers)

    def finish(self, job: Job, writer: BuildWriter, build: Build) -> None:
        """Keeps engines of a build that is being replaced whose graphs are still the same."""
        old = job.bundle.manifest.builds.get(job.label)
        for entry in old.engines if old is not None else []:
            graph = build.graphs.get(entry.graph) or job.bundle.graphs.get(entry.graph)
            source = job.bundle.path / entry.file.file
            if graph is None or graph_digest(graph) != entry.graph_sha256 or not source.is_file():
                continue
            (writer.path / ENGINES).mkdir(exist_ok=True)
            _link(source, writer.path / ENGINES / source.name)
            build.engines.append(entry)

    def resume(self, job: Job, build: Build, given: Mapping[str, Any]) -> bool:
        """See `Backend.resume`: the build's graphs are what these portable graphs become here, and nothing else was asked for.

        Raises BundleError, saying what differs, where that is not so.
        """
        if differing := _differing(job, build, given):
            raise BundleError(
                f"{job.bundle.path} has a build '{build.name}' already, made with another {', '.join(differing)}: choose another "
                "--name, or pass --overwrite to make it anew (engines of graphs that stay the same are kept)."
            )
        self._start(job, job.compiling.sm)
        return True

    def compile(self, job: Job, build: Build) -> Build:
        """Compiles every graph of the build that has no engine with the right key yet."""
        if self._library is None:
            job.progress.start("engines: not built here")
            job.progress.done("engines: not built here", self._elsewhere)
            return build
        kept = build.options.get("max_batch")
        most = _positive(job.compiling.max_batch, kept if isinstance(kept, int) else 1)
        maker = EngineMaker(job, build, self._library, self._sm, gpu=local_gpu(), max_batch=most)
        return maker.make_all()


def _differing(job: Job, build: Build, given: Mapping[str, Any]) -> list[str]:
    """What a build that is there was made with otherwise than is asked for now."""
    options, contract = build.options, job.bundle.manifest.contract
    found = []
    if (build.target, build.backend) != (job.target.name, job.target.backend):
        found.append(f"target ({build.target})")
    if options.get(_LOWERING) != _lowered_from(job):
        found.append("portable graph or description of the target")
    if "block_size" in given and given["block_size"] != options.get("block_size"):
        found.append(f"block size ({options.get('block_size')})")
    if "calibration" in given:
        found.append("set of pictures")
    if "precision" in given:
        asked = resolve_precision(job.target.precision, given["precision"], job.kinds, job.target.words)
        # One word for all means something else for an encoder where pictures are named, which they are once alone.
        possible = {role: {word, job.words[role]} for role, word in asked.items()}
        found += [f"precision ({role}={word})" for role, word in build.precision.items() if word not in possible.get(role, ())]
    if job.compiling.context is not None and isinstance(contract, GenerativeContract):
        asked_sizes = ",".join(map(str, buckets(contract, job.compiling.context)))
        if options.get("context", asked_sizes) != asked_sizes:
            found.append(f"context ({options['context']})")
    return found


def _positive(asked: int | None, otherwise: int) -> int:
    if asked is None:
        return otherwise
    if asked < 1:
        raise TargetError(f"{asked} rows cannot decode together; at least 1.")
    return asked


def _in_place(job: Job) -> bool:
    return "TensorScatter" in job.target.gpu()[0].imports


def _lowered_from(job: Job) -> str:
    """SHA-256 over what the lowered graphs depend on besides precision, block size and context: portable graphs and target."""
    device, _ = job.target.gpu()
    chosen = msgspec.structs.asdict(job.target.options)
    parts = {
        "graphs": {role: graph_digest(entry) for role, entry in sorted(job.bundle.manifest.graphs.items())},
        "opset": device.opset,
        "imports": sorted(device.imports),
        # Those that differ from the defaults: an option that a later version adds changes nothing.
        "options": {name: value for name, value in chosen.items() if value != getattr(Options(), name)},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _link(source: Path, to: Path) -> None:
    """The same file under a second name, or a copy where the file system has no links."""
    try:
        os.link(source, to)
    except OSError:
        shutil.copyfile(source, to)
