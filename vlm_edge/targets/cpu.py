"""The CPU: plans for native kernels, ONNX Runtime for what they cannot express; 4- and 8-bit weights, integer activations."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import onnx_ir as ir

from vlm_edge_runtime.bundle.manifest import GenerativeContract, GraphEntry, KVLayout
from vlm_edge_runtime.errors import TargetError

from .backend import Backend, Job, Option
from .native.build import planned
from .native.errors import NotExpressible
from .native.panels import BLOCK
from .pipeline import Lowered, lower_decoder, lower_embedding, lower_encoder, lower_growing_decoder, lower_recurrent_decoder
from .precision import stored_as
from .samples import PAST


class CpuBackend(Backend):
    """Plans where the target wants native kernels and they express a graph; else GroupQueryAttention on a shared KV buffer where

    a decoder allows it, MatMulNBits and integer products.
    """

    def lower(self, job: Job, role: str) -> Mapping[str, Lowered]:
        """See `Backend.lower`; every portable graph becomes one graph or one plan."""
        kind, options = job.kinds[role], job.target.options
        wanted = {"decoder": options.kernels, "embedding": options.kernels, "encoder": options.encoder_kernels}.get(kind, "")
        why = ""
        if wanted == "native":
            try:
                found = planned(job, role)
            except NotExpressible as error:
                why = f"onnxruntime: no native kernel for {error}"
                if kind == "decoder" and options.kv != "float":
                    raise TargetError(
                        f"{job.label}: an int8 KV cache is one of native decoders, which have no kernel for {error}: "
                        'build it with --kv float (kv = "float" in the target file).'
                    ) from error
            else:
                found.kernels = "native"
                return {role: found}
        lowered = _lowered(job, role)
        lowered.kernels = why
        return {role: lowered}

    def check(self, job: Job) -> None:
        """See `Backend.check`; refuses a KV cache in 8 bits where nothing can have one."""
        super().check(job)
        if job.target.options.kv == "float":
            return
        words = {job.words.get("decoder"), job.words.get("lm_head")}
        why = (
            "this model has no decoder"
            if "decoder" not in job.kinds
            else f"kernels is '{job.target.options.kernels}'"
            if job.target.options.kernels != "native"
            else "this one's weights are fp32, and its cache float32"
            if words == {"fp32"}
            else ""
        )
        if why:
            raise TargetError(
                f"{job.label}: an int8 KV cache is one of native decoders with weights in 4 or 8 bits, and {why}: "
                'build it with --kv float (kv = "float" in the target file).'
            )

    def describe(self, job: Job, role: str, entry: GraphEntry) -> tuple[dict[str, Option], str]:
        """See `Backend.describe`; where calibration pictures are given, says what a plan takes from them."""
        options, remark = super().describe(job, role, entry)
        if entry.format == "plan" and job.words[role] == "int8" and job.calibration(role) is not None:
            options |= {f"{role}.calibration": "ranges are measured while it runs; the pictures tell channels' maxima and means"}
            remark = "its ranges are measured while it runs, the pictures tell channels' maxima and means"
        return options, remark

    def kv(self, job: Job, graphs: Mapping[str, GraphEntry]) -> KVLayout | None:
        """See `Backend.kv`; a plan keeps its cache in what its inputs say."""
        layout, decoder = super().kv(job, graphs), graphs.get("decoder")
        if layout is None or decoder is None or decoder.format != "plan":
            return layout
        dtype = next(spec.dtype for spec in decoder.inputs if spec.name.startswith(PAST))
        return msgspec.structs.replace(layout, dtype=dtype, scale_block=BLOCK if dtype == "int8" else 0)


def _lowered(job: Job, role: str) -> Lowered:
    """A portable graph as ONNX Runtime runs it."""
    model = ir.load(job.bundle.graph_path(role))
    kind, word, options = job.kinds[role], job.words[role], job.target.options
    if kind == "decoder":
        return _decoder(job, model)
    if kind == "embedding":
        return lower_embedding(model, precision=word, block_size=job.block_size)  # type: ignore[arg-type]
    stored = stored_as(kind, word)
    return lower_encoder(model, precision=stored, block_size=job.block_size, options=options, calibration=job.calibration(role))


def _decoder(job: Job, model: ir.Model) -> Lowered:
    contract = job.bundle.manifest.contract
    if not isinstance(contract, GenerativeContract):
        raise TargetError(f"{job.bundle.path}: a decoder in family {contract.family} is not known to {job.target.name}.")
    weights = {"precision": job.words["decoder"], "head": job.words["lm_head"]}
    block_size, options = job.block_size, job.target.options
    if not contract.kv.layers:
        return lower_recurrent_decoder(model, **weights, block_size=block_size, options=options)
    try:
        return lower_decoder(
            model,
            precision=weights["precision"],
            head=weights["head"],
            context_length=contract.context_length,
            block_size=block_size,
            options=options,
        )
    except TargetError as error:  # what the fused kernel cannot do; nothing of the half-rewritten graph is kept
        model = ir.load(job.bundle.graph_path("decoder"))
        return lower_growing_decoder(model, why=str(error), **weights, block_size=block_size, options=options)
