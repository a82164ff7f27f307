"""The graphs of a CPU build as plans, where everything in them has a native kernel."""

from __future__ import annotations

import onnx_ir as ir

from vlm_edge.targets.backend import Job
from vlm_edge.targets.pipeline import Lowered, lower_decoder, lower_encoder
from vlm_edge_runtime.bundle.manifest import GenerativeContract, GraphEntry, TensorSpec
from vlm_edge_runtime.bundle.writer import BuildWriter
from vlm_edge_runtime.errors import TargetError

from .balanced import balanced
from .compile import Compiler
from .embed import embedding_plan, graph_rows
from .encoder import EncoderCompiler
from .errors import NotExpressible
from .plan_file import Plan, Value, write
from .session import SUFFIX


def planned(job: Job, role: str) -> Lowered:
    """A portable graph as a plan, in the precision that is asked for; nothing is lowered for ONNX Runtime.

    Raises NotExpressible with what has no step: such a graph stays with ONNX Runtime as a whole.
    """
    model = ir.load(job.bundle.graph_path(role))
    if job.kinds[role] == "embedding":
        plan, changes = embedding_plan(model, job.words[role], graph_rows(str(job.bundle.graph_path(role))))
        return Lowered(model, [changes], plan)
    return _decoder(job, model) if job.kinds[role] == "decoder" else _encoder(job, role, model)


def save_plan(plan: Plan, writer: BuildWriter, role: str, precision: str, parameters: int) -> GraphEntry:
    """Writes the plan of a graph into the build that is being made; its entry there."""
    path = writer.path / f"{role}{SUFFIX}"
    write(plan, path)
    return GraphEntry(
        role=role,
        model=writer.ref(path.name),
        data=[],
        inputs=[_spec(value) for value in plan.inputs],
        outputs=[_spec(value) for value in plan.outputs],
        precision=precision,
        nodes=len(plan.steps),
        parameters=parameters,
        format="plan",
    )


def _spec(value: Value) -> TensorSpec:
    return TensorSpec(name=value.name, dtype=ir.DataType(value.dtype).numpy().name, shape=value.shape)


def _decoder(job: Job, model: ir.Model) -> Lowered:
    contract, options = job.bundle.manifest.contract, job.target.options
    if not isinstance(contract, GenerativeContract) or not contract.kv.layers:
        raise NotExpressible("a decoder without a KV cache")
    body, head = job.words["decoder"], job.words["lm_head"]
    try:
        lowered = lower_decoder(
            model,
            precision=body,
            head=head,
            context_length=contract.context_length,
            block_size=job.block_size,
            options=options,
            branches=False,
        )
    except TargetError as error:  # what keeps its cache out of one buffer
        raise NotExpressible(f"a cache that grows ({error})") from error
    cache = ir.DataType.FLOAT if body == head == "fp32" else ir.DataType.FLOAT16
    lowered.plan = Compiler(lowered.model, cache=ir.DataType.INT8 if options.kv == "int8" else cache).compile()
    return lowered


def _encoder(job: Job, role: str, model: ir.Model) -> Lowered:
    """`int8` computes in 8 bits, with weights per output and activations per row, measured while it runs; pictures tell how large

    channels are and, where calibration pictures are given, their means (`balanced`). `int8w` and `int4` store weights per block;
    activations are 8 bits per block, as with accuracy level 4.
    """
    word, options = job.words[role], job.target.options
    if word in ("int8w", "int4") and options.accuracy_level != 4:
        raise NotExpressible(f"weights of {word} with activations in floats (accuracy_level {options.accuracy_level})")
    integer = word == "int8"
    lowered = lower_encoder(model, precision="fp32" if integer else word, block_size=job.block_size, options=options)
    if integer:
        lowered.changes += balanced(job, role, lowered.model)
    compiler = EncoderCompiler(lowered.model, integer=integer, keep_first=options.keep_first, keep_last=options.keep_last)
    lowered.plan = compiler.compile()
    return lowered
