"""The decoder of a CPU build as a plan, in place of its graph, where everything in it has a native kernel."""

from __future__ import annotations

from pathlib import Path

import msgspec
import onnx_ir as ir

from vlm_edge.targets.backend import Job, checked
from vlm_edge.targets.pipeline import lower_decoder
from vlm_edge.targets.selfcheck import check_decoder
from vlm_edge_runtime.bundle.manifest import Build, GenerativeContract, GraphEntry, TensorSpec
from vlm_edge_runtime.bundle.writer import BuildWriter
from vlm_edge_runtime.errors import TargetError

from .compile import Compiler
from .errors import NotExpressible
from .plan_file import Plan, write
from .session import SUFFIX

OPTION = "decoder.kernels"
"""The build's option that says what runs the decoder: "native", or why ONNX Runtime does."""


def native_decoder(job: Job, writer: BuildWriter, build: Build, *, exact: bool) -> None:
    """Compiles the decoder of a build that is being made into a plan, compares it with the portable graph, and lets it take

    the place of the lowered one. A decoder with something that no step does stays with ONNX Runtime as a whole; the build's
    options say why. Raises TargetError when the plan computes something else than the graph.
    """
    entry = build.graphs.get("decoder")
    contract = job.bundle.manifest.contract
    if entry is None or not isinstance(contract, GenerativeContract) or build.kv is None:
        return
    if not contract.kv.layers or not build.kv.shared_buffer:
        build.options[OPTION] = "onnxruntime: it keeps no cache in one buffer"
        return
    step = "plan decoder"
    job.progress.start(step)
    try:
        plan = _plan(job, contract)
    except NotExpressible as error:
        build.options[OPTION] = f"onnxruntime: no native kernel for {error}"
        job.progress.done(step, str(build.options[OPTION]))
        return
    path = writer.path / f"decoder{SUFFIX}"
    try:
        write(plan, path)
        difference = checked(check_decoder(job.bundle, path, job.samples), job, "decoder", exact=exact)
    except TargetError as error:
        job.progress.failed(step, str(error))
        raise
    for ref in (entry.model, *entry.data):
        (writer.path / Path(ref.file).name).unlink()
    build.graphs["decoder"] = _entry(entry, plan, writer, path)
    build.kv = msgspec.structs.replace(build.kv, dtype="float32" if _exact(job) else "float16")
    build.options |= {
        OPTION: "native",
        "decoder.max_abs": difference.max_abs,
        "decoder.relative": difference.relative,
        "decoder.cosine": difference.cosine,
    }
    job.progress.done(step, f"{len(plan.steps)} steps, cosine {difference.cosine:.5f} to portable")


def _exact(job: Job) -> bool:
    return job.words["decoder"] == job.words["lm_head"] == "fp32"


def _plan(job: Job, contract: GenerativeContract) -> Plan:
    model = ir.load(job.bundle.graph_path("decoder"))
    lower_decoder(
        model,
        precision=job.words["decoder"],
        head=job.words["lm_head"],
        context_length=contract.context_length,
        block_size=job.block_size,
        options=job.target.options,
        branches=False,
    )
    return Compiler(model, cache=ir.DataType.FLOAT if _exact(job) else ir.DataType.FLOAT16).compile()


def _entry(graph: GraphEntry, plan: Plan, writer: BuildWriter, path: Path) -> GraphEntry:
    def specs(values: list[TensorSpec], types: dict[str, int]) -> list[TensorSpec]:
        return [msgspec.structs.replace(one, dtype=ir.DataType(types[one.name]).numpy().name) for one in values]

    types = {value.name: value.dtype for value in (*plan.inputs, *plan.outputs)}
    names = [[value.name for value in values] for values in (plan.inputs, plan.outputs)]
    inputs = sorted((one for one in graph.inputs if one.name in types), key=lambda one: names[0].index(one.name))
    outputs = sorted((one for one in graph.outputs if one.name in types), key=lambda one: names[1].index(one.name))
    return msgspec.structs.replace(
        graph,
        model=writer.ref(path.name),
        data=[],
        inputs=specs(inputs, types),
        outputs=specs(outputs, types),
        nodes=len(plan.steps),
        format="plan",
    )
