"""Everything that can be said of a build before it is compiled: which nodes the target refuses, and what memory it needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import onnx_ir as ir

from vlm_edge.progress import Progress, Silent
from vlm_edge_runtime.bundle.engine_profile import EngineProfile, ShapeRange
from vlm_edge_runtime.bundle.manifest import FileRef, GenerativeContract, GraphEntry, KVLayout, TensorSpec
from vlm_edge_runtime.bundle.reader import open_bundle

from .backend import CompileOptions, Job, backend_of, settle_one_word
from .memory_plan import GraphMemory, MemoryPlan, gib, graph_memory, memory_plan, refuse_memory
from .precision import bundle_roles, resolve_precision, stored_as
from .preflight import Problem, preflight, refuse
from .samples import Samples
from .target import Target, load_target
from .tensorrt.profiles import CHUNK, decoder_profiles, graph_profiles

_PICTURES = {"images": 4, "tiles": 17, "frames": 16, "texts": 16}
"""Rows of what a prompt brings, where no engine's profile says it."""
_NO_FILE = FileRef(file="", sha256="", bytes=0)


class Examination:
    """Takes in one lowered graph after another, and then says what is wrong with them and what they need together."""

    def __init__(self, job: Job, *, context: int | None = None, batch: int | None = None) -> None:
        """`context`, `batch`: what to plan for; None: what the job asks for, else the target."""
        self._job, self._context, self._batch = job, context, batch
        self._memory: list[GraphMemory] = []
        self._kv: KVLayout | None = None
        self.problems: list[Problem] = []

    def add(self, role: str, name: str, model: ir.Model) -> None:
        """Looks at one lowered graph of `role`; `name` is its name in the build (`decoder.c1024`). Keeps nothing of it."""
        job = self._job
        self.problems += preflight(model, job.target, name)
        word = stored_as(job.kinds[role], job.words[role], job.target.backend)
        self._memory.append(graph_memory(model, name, role, word, self._profiles(role, model)))
        if job.kinds[role] == "decoder" and job.bundle.kv is not None:
            cache = next((value for value in model.graph.inputs if str(value.name).startswith("past_key_values.")), None)
            dtype = cache.dtype.numpy().name if cache is not None and cache.dtype is not None else job.bundle.kv.dtype
            self._kv = msgspec.structs.replace(job.bundle.kv, dtype=dtype)

    def plan(self) -> MemoryPlan:
        """What all graphs need together, at the longest context and the largest batch that were asked for."""
        return memory_plan(
            self._memory,
            self._job.target,
            kv=self._kv,
            context=self.context,
            batch=self.batch,
            longest=self._longest or self.context,
        )

    def summary(self) -> str:
        """The plan in a line."""
        plan = self.plan()
        line = f"running {gib(plan.total)} of {gib(plan.usable)} (context {plan.context}, batch {plan.batch})"
        if plan.build_most:
            line += f", compiling {gib(plan.build_least)} to {gib(plan.build_most)}"
        return "; ".join([line, *plan.notes])

    def refuse(self) -> None:
        """Raises TargetError for nodes that cannot be built, or memory that does not suffice."""
        refuse(self.problems, self._job.target)
        refuse_memory(self.plan())

    @property
    def context(self) -> int:
        """Tokens of the longest cache that was asked for; no more than the model can attend to."""
        wanted = self._context or max(self._job.compiling.context or self._job.target.gpu()[1].buckets)
        return min(wanted, self._longest or wanted)

    @property
    def batch(self) -> int:
        """Rows that decode together at most."""
        return self._batch or self._job.compiling.max_batch or self._job.target.gpu()[1].max_batch

    @property
    def _longest(self) -> int:
        contract = self._job.bundle.manifest.contract
        return contract.context_length if isinstance(contract, GenerativeContract) else 0

    def _profiles(self, role: str, model: ir.Model) -> list[EngineProfile]:
        job, entry = self._job, _entry(role, model)
        if not job.target.backend.startswith("tensorrt"):
            return [self._usual(entry)]
        if job.kinds[role] != "decoder":
            return graph_profiles(job.bundle, role, entry, max_batch=self.batch, longest=self.context)
        cache = next((spec for spec in entry.inputs if spec.name.startswith("past_key_values.")), None)
        capacity = cache.shape[2] if cache is not None else None
        number: Literal["one", "two"] = "one" if job.compiling.profiles == "one" else "two"
        size = capacity if isinstance(capacity, int) else None
        return decoder_profiles(job.bundle, entry, capacity=size, max_batch=self.batch, number=number)

    def _usual(self, entry: GraphEntry) -> EngineProfile:
        """Sizes of a graph that is compiled for none: all rows, a chunk of the prompt, a cache of the whole context."""
        known = {"batch": self.batch, "sequence": min(CHUNK, self.context), "total_sequence_length": 1} | _PICTURES

        def size(dim: int | str) -> int:
            return dim if isinstance(dim, int) else known.get(dim, self.context)

        largest = {spec.name: tuple(map(size, spec.shape)) for spec in entry.inputs}
        return EngineProfile(shapes={name: ShapeRange(min=shape, opt=shape, max=shape) for name, shape in largest.items()})


def examine(
    bundle: str | Path,
    target: str | Path | Target,
    *,
    precision: str | dict[str, str] | None = None,
    block_size: int | None = None,
    calibration: Sequence[str | Path] | None = None,
    context: int | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Examination:
    """Lowers every graph of a bundle for a target in memory, and looks at it; writes nothing and compiles nothing.

    `context`: tokens of the cache to plan for, `batch`: rows (None: the target's own). The others are as for `build`. Raises
    TargetError (unknown target or precision, a target without a GPU, a graph that cannot be lowered), BundleError.
    """
    chosen = target if isinstance(target, Target) else load_target(target)
    chosen.gpu()
    opened = open_bundle(bundle)
    kinds, backend = bundle_roles(opened.graphs), backend_of(chosen)
    progress = progress or Silent()
    # Which scales are chosen changes no size and no operator, and the quick way is several times as fast.
    quick = msgspec.structs.replace(chosen, options=msgspec.structs.replace(chosen.options, scheme="absmax"))
    job = Job(
        bundle=opened,
        target=quick,
        label=chosen.name,
        kinds=kinds,
        words=resolve_precision(chosen.precision, precision, kinds, chosen.words),
        block_size=block_size or backend.block_size,
        pictures=list(calibration or []),
        samples=Samples(opened),
        progress=progress,
    )
    if chosen.backend.startswith("tensorrt"):
        job.compiling = CompileOptions(context=(context,) if context else None, max_batch=batch, make=False)
    settle_one_word(job, precision)
    backend.check(job)
    found = Examination(job, context=context, batch=batch)
    for role in opened.graphs:
        step = f"examine {role} ({job.words[role]})"
        progress.start(step)
        try:
            for name, lowered in backend.lower(job, role).items():
                found.add(role, name, lowered.model)
        except BaseException as error:
            progress.failed(step, str(error))
            raise
        progress.done(step)
    return found


def _entry(role: str, model: ir.Model) -> GraphEntry:
    """A lowered graph as the manifest would name it; its files do not exist."""
    return GraphEntry(role=role, model=_NO_FILE, inputs=[_spec(value) for value in model.graph.inputs], outputs=[])


def _spec(value: ir.Value) -> TensorSpec:
    dims = value.shape if value.shape is not None else ()
    shape = tuple(size if isinstance(size, int) else str(size.value or f"dim{axis}") for axis, size in enumerate(dims))
    return TensorSpec(name=str(value.name), dtype=value.dtype.numpy().name if value.dtype is not None else "float32", shape=shape)
