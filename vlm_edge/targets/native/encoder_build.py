"""The graphs of a CPU build that see images, and what follows them, as plans in place of their lowered graphs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import onnx_ir as ir

from vlm_edge.targets.backend import Job, checked
from vlm_edge.targets.pipeline import lower_encoder
from vlm_edge.targets.selfcheck import check_encoder
from vlm_edge_runtime.bundle.manifest import Build, GraphEntry
from vlm_edge_runtime.bundle.writer import BuildWriter
from vlm_edge_runtime.errors import TargetError

from .encoder import EncoderCompiler
from .errors import NotExpressible
from .plan_file import Plan, write
from .session import SUFFIX


def native_encoders(job: Job, writer: BuildWriter, build: Build) -> None:
    """Compiles every encoder of a build that is being made into a plan, compares it with the portable graph, and lets it take

    the place of the lowered one. A graph with something that no step does stays with ONNX Runtime as a whole; the build's
    option "ROLE.kernels" says why. Graphs that no pass changes are none of the build's. Raises TargetError when a plan computes
    something else than its graph.
    """
    for role in job.bundle.graphs:
        if job.kinds[role] == "encoder" and role in build.graphs:
            _native_encoder(job, writer, build, role)


def _native_encoder(job: Job, writer: BuildWriter, build: Build, role: str) -> None:
    option, step, word = f"{role}.kernels", f"plan {role}", job.words[role]
    job.progress.start(step)
    try:
        plan = encoder_plan(job, role)
    except NotExpressible as error:
        build.options[option] = f"onnxruntime: no native kernel for {error}"
        job.progress.done(step, str(build.options[option]))
        return
    path = writer.path / f"{role}{SUFFIX}"
    try:
        write(plan, path)
        difference = checked(check_encoder(job.bundle, role, path, job.samples), job, role, exact=word == "fp32")
    except TargetError as error:
        job.progress.failed(step, str(error))
        raise
    old = build.graphs[role]
    for ref in (old.model, *old.data):
        (writer.path / Path(ref.file).name).unlink()
    build.graphs[role] = _entry(old, plan, writer, path, word)
    build.options |= {
        option: "native",
        f"{role}.max_abs": difference.max_abs,
        f"{role}.relative": difference.relative,
        f"{role}.cosine": difference.cosine,
    }
    job.progress.done(step, f"{len(plan.steps)} steps, cosine {difference.cosine:.5f} to portable")


def encoder_plan(job: Job, role: str) -> Plan:
    """The plan of a portable graph in the precision that is asked for. Raises NotExpressible.

    `int8` computes in 8 bits, with weights per output and activations per row, measured while it runs: calibration pictures
    are not needed. `int8w` and `int4` store weights per block; activations are 8 bits per block, as with accuracy level 4.
    """
    word, options = job.words[role], job.target.options
    if word in ("int8w", "int4") and options.accuracy_level != 4:
        raise NotExpressible(f"weights of {word} with activations in floats (accuracy_level {options.accuracy_level})")
    model = ir.load(job.bundle.graph_path(role))
    lower_encoder(model, precision="fp32" if word == "int8" else word, block_size=job.block_size, options=options)
    integer = word == "int8"
    return EncoderCompiler(model, integer=integer, keep_first=options.keep_first, keep_last=options.keep_last).compile()


def _entry(graph: GraphEntry, plan: Plan, writer: BuildWriter, path: Path, word: str) -> GraphEntry:
    """The graph's entry with the plan for its file; inputs and outputs in the plan's order, which is the portable graph's."""
    inputs, outputs = ({value.name: value for value in values} for values in (graph.inputs, graph.outputs))
    return msgspec.structs.replace(
        graph,
        model=writer.ref(path.name),
        data=[],
        inputs=[inputs[value.name] for value in plan.inputs],
        outputs=[outputs[value.name] for value in plan.outputs],
        precision=word,
        nodes=len(plan.steps),
        format="plan",
    )
