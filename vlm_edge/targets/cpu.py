"""ONNX Runtime on the CPU: fused kernels, 4- and 8-bit weights, integer activations."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from vlm_edge_runtime.bundle.manifest import Build, GenerativeContract
from vlm_edge_runtime.bundle.writer import BuildWriter
from vlm_edge_runtime.errors import TargetError

from .backend import Backend, Job
from .native.build import native_decoder
from .native.encoder_build import native_encoders
from .pipeline import Lowered, lower_decoder, lower_embedding, lower_encoder, lower_growing_decoder, lower_recurrent_decoder
from .precision import stored_as


class CpuBackend(Backend):
    """GroupQueryAttention on a shared KV buffer where a decoder allows it, MatMulNBits and integer products."""

    def lower(self, job: Job, role: str) -> Mapping[str, Lowered]:
        """See `Backend.lower`; every portable graph becomes one."""
        model = ir.load(job.bundle.graph_path(role))
        kind, word, options = job.kinds[role], job.words[role], job.target.options
        if kind == "decoder":
            return {role: _decoder(job, model)}
        if kind == "embedding":
            return {role: lower_embedding(model, precision=word, block_size=job.block_size)}  # type: ignore[arg-type]
        stored = stored_as(kind, word)
        calibration = job.calibration(role)
        return {role: lower_encoder(model, precision=stored, block_size=job.block_size, options=options, calibration=calibration)}

    def finish(self, job: Job, writer: BuildWriter, build: Build) -> None:
        """See `Backend.finish`; decoder and encoders become plans where the target wants native kernels."""
        if job.target.options.kernels == "native" and "decoder" in build.graphs:
            native_decoder(job, writer, build, exact=self.is_exact(job, "decoder"))
        if job.target.options.encoder_kernels == "native":
            native_encoders(job, writer, build)


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
