"""ONNX Runtime on CUDA: half precision, fused attention on a shared KV buffer, 4- and 8-bit weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import msgspec
import onnx_ir as ir

from vlm_edge.passes.base import Changes, GraphPass, run_passes
from vlm_edge.passes.block_attention import BlockAttention
from vlm_edge.passes.cleanup import Cleanup
from vlm_edge.passes.cuda_kernels import CudaKernels
from vlm_edge.passes.flatten import Unflatten
from vlm_edge.passes.fuse_rotary import FuseRotaryEmbedding
from vlm_edge.passes.fuse_skip_norm import FuseSkipNorm
from vlm_edge.passes.gemm import GemmToMatMul
from vlm_edge.passes.graph import MICROSOFT, attribute_int, fixed_dim
from vlm_edge.passes.group_query_attention import LowerToGroupQueryAttention
from vlm_edge.passes.last_token import LastTokenLogits
from vlm_edge.passes.layout import CancelLayout
from vlm_edge.passes.multi_head_attention import LowerToMultiHeadAttention
from vlm_edge.passes.pack_qkv import PackQKV
from vlm_edge.passes.recompose_rotary import RecomposeRotary
from vlm_edge.passes.strong_types import Islands, StrongTypes
from vlm_edge.quantize.blockwise import BlockFormat
from vlm_edge.quantize.weight_only import WeightOnlyMatMul
from vlm_edge_runtime.bundle.manifest import GenerativeContract, GraphEntry, KVLayout
from vlm_edge_runtime.errors import TargetError

from .backend import Backend, Job
from .pipeline import Lowered
from .precision import Kind
from .target import Options

_LARGEST_HEAD = 256
"""Head sizes that the CUDA kernel of GroupQueryAttention takes: multiples of 8 up to this (flash attention's)."""
_ANY_ACCURACY = 0
"""MatMulNBits' accuracy level left open: CUDA has no such thing, and the CPU (where builds are compared) computes exactly."""


class CudaBackend(Backend):
    """Half precision everywhere but the logits; what the CUDA kernels cannot take goes on with a growing cache."""

    def lower(self, job: Job, role: str) -> Mapping[str, Lowered]:
        """See `Backend.lower`; every portable graph becomes one."""
        contract = job.bundle.manifest.contract
        kind = job.kinds[role]
        if kind == "decoder" and not isinstance(contract, GenerativeContract):
            raise TargetError(f"{job.bundle.path}: a decoder in family {contract.family} is not known to {job.target.name}.")
        lower = partial(
            lower_for_cuda,
            kind=kind,
            precision=job.words[role],
            head=job.words.get("lm_head"),
            context_length=contract.context_length if isinstance(contract, GenerativeContract) else 512,
            block_size=job.block_size,
            options=job.target.options,
        )
        path = job.bundle.graph_path(role)
        try:
            return {role: lower(ir.load(path))}
        except NoSharedBuffer as error:  # nothing of the half-rewritten graph is kept
            return {role: lower(ir.load(path), grows=str(error))}

    def kv(self, job: Job, graphs: Mapping[str, GraphEntry]) -> KVLayout | None:
        """The cache in the type that the decoder keeps it in."""
        layout, decoder = super().kv(job, graphs), graphs.get("decoder")
        if layout is None or decoder is None:
            return layout
        dtype = next((spec.dtype for spec in decoder.inputs if spec.name.startswith("past_key_values.")), layout.dtype)
        return msgspec.structs.replace(layout, dtype=dtype)


class NoSharedBuffer(TargetError):
    """Why a decoder cannot keep its cache in one shared buffer on CUDA."""


def lower_for_cuda(
    model: ir.Model,
    *,
    kind: Kind,
    precision: str,
    head: str | None = None,
    context_length: int = 512,
    block_size: int = 32,
    options: Options | None = None,
    grows: str | None = None,
) -> Lowered:
    """A portable graph → the graph that ONNX Runtime's CUDA provider is fast at, in place.

    `precision`, `head` (a decoder's product that makes the logits): fp32, fp16, int8 or int4 (weights only; what computes
    beside them is fp16). All float inputs and outputs become fp16 but those of the host (`strong_types.FULL_INPUTS`,
    `FULL_OUTPUTS`): pixels in and logits, embeddings out are fp32. Norms stay fp16 nodes: the CUDA kernels sum in fp32.

    A decoder with a cache: `past_key_values` fp16 [batch, kv_heads, capacity, head_dim] bound to `present`, `seqlens_k` and
    `total_sequence_length` (in host memory) as in the CPU builds. `grows`: why it keeps a growing cache instead. Raises
    TargetError for a decoder that the fused kernel cannot take: heads that are no multiple of 8 or above 256, a bias by
    distance, fp32 (the kernel is half precision only), and whatever LowerToGroupQueryAttention refuses.
    """
    options = options or Options()
    if kind == "codes":
        return Lowered(model, run_passes(model, [Cleanup()]))
    steps = _structure(model, kind, precision, context_length, grows)
    changes = run_passes(model, steps)
    if grows is not None:
        changes.append(Changes("kv_cache", notes=[f"the cache grows at every token instead of staying in one buffer: {grows}"]))
    if kind == "decoder":
        _check_attention(model.graph)
        changes += run_passes(model, _weights(precision, head or precision, block_size, options))
    if precision != "fp32" or (kind == "decoder" and head not in (None, "fp32")):
        changes += run_passes(model, [StrongTypes("fp16", Islands(norms=False)), Cleanup()])
    return Lowered(model, changes)


def _structure(model: ir.Model, kind: Kind, precision: str, context_length: int, grows: str | None) -> list[GraphPass]:
    if kind == "embedding":
        return [Cleanup()]
    cached = any(str(value.name).startswith("past_key_values.") for value in model.graph.inputs)
    shared = kind == "decoder" and cached and grows is None
    if shared and precision == "fp32":
        raise NoSharedBuffer("the CUDA kernel of GroupQueryAttention computes in half precision only")
    steps: list[GraphPass] = [Cleanup(), GemmToMatMul()]
    if kind == "decoder":
        steps.append(RecomposeRotary())
    if shared:
        steps.append(_Shared(context_length))
    steps += [LowerToMultiHeadAttention(), Unflatten(), CancelLayout()]
    if shared:
        steps += [FuseRotaryEmbedding(context_length), PackQKV(), BlockAttention()]
    if kind == "decoder":
        steps.append(LastTokenLogits())
    return [*steps, FuseSkipNorm(), CudaKernels(), Cleanup()]


class _Shared(LowerToGroupQueryAttention):
    """The same rewriting; what it refuses lets the cache grow."""

    def apply(self, model: ir.Model) -> Changes:
        try:
            return super().apply(model)
        except TargetError as error:
            raise NoSharedBuffer(str(error)) from error


def _check_attention(graph: ir.Graph) -> None:
    """Raises for a GroupQueryAttention that the CPU kernel takes and the CUDA kernel does not."""
    for node in graph:
        if node.op_type != "GroupQueryAttention" or node.domain != MICROSOFT:
            continue
        label = node.name or str(node.outputs[0].name)
        size = fixed_dim(node.inputs[3], 3) or 0
        if size % 8 or size > _LARGEST_HEAD:
            raise NoSharedBuffer(f"{label} has heads of {size}; the CUDA kernel takes multiples of 8 up to {_LARGEST_HEAD}")
        if len(node.inputs) > 10 and node.inputs[10] is not None:
            raise NoSharedBuffer(f"{label} adds a bias by distance, which the CUDA kernel does not know")
        if attribute_int(node, "num_heads", 1) % attribute_int(node, "kv_num_heads", 1):
            raise NoSharedBuffer(f"{label}: query heads are no multiple of KV heads")


def _weights(precision: str, head: str, block_size: int, options: Options) -> list[GraphPass]:
    body, last = (_form(word, block_size, options) for word in (precision, head))
    if body is None and last is None:
        return []
    return [WeightOnlyMatMul(body, head=last, keep_head=last is None, accuracy_level=_ANY_ACCURACY), Cleanup()]


def _form(word: str, block_size: int, options: Options) -> BlockFormat | None:
    if word not in ("int4", "int8"):
        return None
    return BlockFormat(bits=4 if word == "int4" else 8, block_size=block_size, symmetric=options.symmetric, scheme=options.scheme)
