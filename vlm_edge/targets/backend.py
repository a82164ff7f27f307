"""What a backend is to the driver of builds, and which there are.

A target names its backend; the driver (`build.py`) asks it to check, to lower each graph, to compare what came out, and to make
whatever is compiled from the graphs. Nothing in the driver knows one backend from another.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import msgspec

from vlm_edge.progress import Progress, Silent
from vlm_edge_runtime.bundle.manifest import Build, GenerativeContract, GraphEntry, KVLayout
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.bundle.writer import BuildWriter
from vlm_edge_runtime.errors import TargetError

from .pipeline import Inputs, Lowered
from .precision import Kind, replaced, stored_as
from .samples import Feeds, Samples, modality_feeds
from .selfcheck import FP32_TOLERANCE, Difference, check_decoder, check_encoder
from .steps import is_shared
from .target import Target

Option = str | int | float | bool

_BACKENDS = {
    "ort-cpu": "vlm_edge.targets.cpu:CpuBackend",
    "ort-cuda": "vlm_edge.targets.cuda:CudaBackend",
    "tensorrt": "vlm_edge.targets.tensorrt.backend:TensorRTBackend",
    "tensorrt-rtx": "vlm_edge.targets.tensorrt.backend:TensorRTBackend",
}
"""Backend name → where its class is; it is imported when a target wants it."""


class CompileOptions(msgspec.Struct, kw_only=True, frozen=True):
    """What can be asked of builds with compiled engines beyond the target's own data; None leaves it to the target.

    `sm`: compute capabilities to compile for (86 is 8.6). `context`: cache sizes, one decoder each. `max_batch`: rows that
    decode together at most. `profiles`: how many optimisation profiles a decoder's engine has; `auto` decides by its weights.
    `make`: False leaves the engines to be made later (on the device).
    """

    sm: tuple[int, ...] | None = None
    context: tuple[int, ...] | None = None
    max_batch: int | None = None
    profiles: Literal["auto", "one", "two"] = "auto"
    make: bool = True


@dataclass(slots=True)
class Job:
    """One build while it is made: the opened portable bundle, the target, and what was asked.

    `kinds` and `words`: what each graph is, and in what precision it is made. `pictures`: for calibration. `label`: the build's
    name. `options`: what a backend's `check` found out and wants recorded with the build.
    """

    bundle: Bundle
    target: Target
    label: str
    kinds: dict[str, Kind]
    words: dict[str, str]
    block_size: int
    pictures: Sequence[str | Path]
    samples: Samples
    compiling: CompileOptions = field(default_factory=CompileOptions)
    progress: Progress = field(default_factory=Silent)
    options: dict[str, Option] = field(default_factory=dict)

    def sees_images(self, role: str) -> bool:
        """Whether images pass through a graph."""
        contract = self.bundle.manifest.contract
        modalities = contract.modalities if isinstance(contract, GenerativeContract) else []
        if not modalities:
            return role == "vision_encoder"
        return any(role in one.graphs for one in modalities if one.kind == "image")

    def calibration(self, role: str) -> Inputs | None:
        """Inputs of a graph that images pass through; None where pictures say nothing (or there are none)."""
        if not self.pictures or not self.sees_images(role):
            return None

        def inputs() -> Iterator[Feeds]:
            yield from modality_feeds(self.bundle, role, self.pictures)

        return inputs


def settle_one_word(job: Job, precision: str | Mapping[str, str] | None) -> None:
    """Says which graphs got another precision than the one word that was given for all (see `parse_precision`).

    To those belong, on TensorRT, encoders whose activations nothing can be seen of: no pictures were named, or none passes
    through; they are fp16.
    """
    if not isinstance(precision, str) or "=" in precision:
        return
    for role, kind in job.kinds.items():
        calibrated = job.words[role] in ("int8", "fp8") and stored_as(kind, job.words[role], job.target.backend)[-1] != "w"
        if kind == "encoder" and calibrated and "int8w" in job.target.words["decoder"] and job.calibration(role) is None:
            job.words[role] = "fp16"
    others = replaced(precision, job.words, job.kinds)
    if others:
        step = f"precision {precision.strip()}"
        job.progress.start(step)
        job.progress.done(step, "; ".join(f"{role} is {word}" for role, word in others.items()))
        job.options |= {f"{role}.asked": precision.strip() for role in others}


class Backend(ABC):
    """How graphs are made ready for one engine. What is not overridden is right for ONNX Runtime."""

    block_size: ClassVar[int] = 32
    """Weights per scale of weight-only graphs where the user does not say."""

    def check(self, job: Job) -> None:
        """Called before anything is lowered. Raises TargetError for what the target cannot run; prints and keeps nothing."""
        if job.compiling != CompileOptions():
            raise TargetError(
                f"{job.target.name} compiles no engines ({job.target.backend}): SM, context, batch and profiles cannot be chosen."
            )

    @abstractmethod
    def lower(self, job: Job, role: str) -> Mapping[str, Lowered]:
        """The graphs that one portable graph becomes, by the name each has in the build (most often `{role: lowered}`)."""

    def compare(self, job: Job, role: str, built: Path) -> Difference:
        """How far a built graph of `role` is from the portable one, both on the CPU, on sample inputs."""
        if job.kinds[role] == "decoder":
            return check_decoder(job.bundle, built, job.samples)
        return check_encoder(job.bundle, role, built, job.samples)

    def is_exact(self, job: Job, role: str) -> bool:
        """Whether a built graph must agree to FP32_TOLERANCE."""
        return job.words[role] == "fp32" and (role != "decoder" or job.words["lm_head"] == "fp32")

    def describe(self, job: Job, role: str, entry: GraphEntry) -> tuple[dict[str, Option], str]:
        """What the build's options say about one of its graphs, and what its progress line says."""
        if job.kinds[role] != "decoder" or job.bundle.kv is None or not job.bundle.kv.layers:
            return {}, ""
        kept = is_shared([spec.name for spec in entry.inputs])
        return {f"{role}.kv_cache": "shared" if kept else "growing"}, "" if kept else "its cache grows (see report.json)"

    def kv(self, job: Job, graphs: Mapping[str, GraphEntry]) -> KVLayout | None:
        """The cache as the built decoder keeps it: in a shared buffer where the graph was lowered to one, else growing.

        A decoder without layers that cache has nothing that could grow.
        """
        layout, decoder = job.bundle.kv, graphs.get("decoder")
        if layout is None:
            return None
        shared = decoder is not None and (not layout.layers or is_shared([spec.name for spec in decoder.inputs]))
        return msgspec.structs.replace(layout, shared_buffer=shared)

    def finish(self, job: Job, writer: BuildWriter, build: Build) -> None:  # noqa: B027 - most backends have nothing to add
        """Called when every graph is written, before the build takes its place: more files, entries in `build`."""

    def compile(self, job: Job, build: Build) -> Build:
        """Called when the build is in its place: makes its engines, one after another, each recorded at once."""
        return build

    def resume(self, job: Job, build: Build, given: Mapping[str, object]) -> bool:
        """Whether a build of that name that is there already is what was asked for, and needs `compile` alone.

        `given`: what the user asked for explicitly (precision, block size …). False: there is nothing to go on with.
        """
        return False


def checked(difference: Difference, job: Job, role: str, *, exact: bool) -> Difference:
    """Raises TargetError for a built graph that gives NaN, or that had to be exact and is not."""
    if exact and not difference.relative <= FP32_TOLERANCE:
        raise TargetError(
            f"lowering changed what {role} computes: relative difference {difference.relative:.2e} to the portable graph, "
            f"{FP32_TOLERANCE:.0e} is allowed in fp32. Please report this model; build it for another target meanwhile."
        )
    if difference.max_abs == float("inf"):
        raise TargetError(f"the built {role} ({job.words[role]}) gives NaN or infinity; choose another precision for it.")
    return difference


def backend_of(target: Target) -> Backend:
    """The backend that a target names. Raises TargetError for one that this installation does not have."""
    module, _, name = _BACKENDS[target.backend].partition(":")
    try:
        found: type[Backend] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise TargetError(f"{target.name}: backend {target.backend} is not part of this installation.") from error
    return found()
