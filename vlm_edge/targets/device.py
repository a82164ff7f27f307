"""What a GPU target's `[device]` and `[context]` tables say: hardware, TensorRT version, what its parser imports, memory."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from vlm_edge_runtime.errors import TargetError

NativeOp = Literal["Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization"]
"""Operators of opset 23 and 24 that TensorRT learnt late; a target without them gets them decomposed."""
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4", "fp8", "nvfp4"]

GIB = 2**30


class Device(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A GPU, and the software that compiles for it.

    `sm`: compute capabilities × 10 (8.7 → 87). `tensorrt`: the versions of the builder that compiles for it, `>=10.3,<10.4`
    (TensorRT-RTX's where that is the backend, "" for ONNX Runtime). `opset`: the newest ONNX opset its parser takes. `imports`:
    native operators its graphs may hold. `precisions`: what the hardware computes in (int4 as weights alone). `memory_gib`
    (2³⁰ bytes) is shared with the CPU where `memory_shared`; `reserved_gib` of it stays with the system (and the CUDA context).
    `bandwidth_gbs`: 10⁹ bytes a second. `jetpack`: the JetPack that brings this TensorRT, "" elsewhere.
    """

    sm: list[int]
    tensorrt: str = ""
    opset: int
    imports: list[NativeOp] = []
    precisions: list[Precision]
    memory_gib: float
    memory_shared: bool = False
    reserved_gib: float
    bandwidth_gbs: float
    jetpack: str = ""

    @property
    def memory_bytes(self) -> int:
        """All of the device's memory."""
        return int(self.memory_gib * GIB)

    @property
    def usable_bytes(self) -> int:
        """What is left of the memory beside the system."""
        return int((self.memory_gib - self.reserved_gib) * GIB)

    @property
    def oldest_tensorrt(self) -> str:
        """The oldest version that `tensorrt` allows; what it imports, all of the range imports."""
        return bounds(self.tensorrt)[0]

    def accepts(self, version: str) -> bool:
        """Whether a TensorRT of this version (`10.16.1.11`) may compile for the target."""
        low, high = bounds(self.tensorrt)
        return numbers(low) <= numbers(version) and (not high or numbers(version) < numbers(high))


class Context(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How long a decoder's cache may be. One engine per bucket: its capacity is static, in tokens.

    `max_batch`: rows that decode together at most.
    """

    buckets: list[int] = msgspec.field(default_factory=lambda: [1024, 4096])
    max_batch: int = 1


class Card(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One product of a target's family: what differs."""

    memory_gib: float
    bandwidth_gbs: float
    reserved_gib: float | None = None


def bounds(versions: str) -> tuple[str, str]:
    """`>=10.3,<10.4` → ("10.3", "10.4"); without an upper bound the second is "". Raises TargetError for anything else."""
    found = re.fullmatch(r"\s*>=\s*(\d+(?:\.\d+)*)\s*(?:,\s*<\s*(\d+(?:\.\d+)*)\s*)?", versions)
    if found is None:
        raise TargetError(f"'{versions}' is not a range of versions; write it as '>=10.3,<10.4'.")
    return found[1], found[2] or ""


def numbers(version: str) -> tuple[int, ...]:
    """`10.16.1.11` → (10, 16, 1, 11); what follows the numbers (a local suffix) is left out."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^0-9.]", version, maxsplit=1)[0]))


def check_device(device: Device, context: Context, backend: str, where: str) -> None:
    """Raises TargetError for tables that contradict each other or hold impossible numbers."""
    if backend.startswith("tensorrt"):
        bounds(device.tensorrt)
    elif device.tensorrt:
        raise TargetError(f"{where}: a TensorRT version is named for backend {backend}, which does not use it; leave it out.")
    if not device.sm or any(not 50 <= sm <= 199 for sm in device.sm):
        raise TargetError(f"{where}: sm = {device.sm} are not compute capabilities; write 8.7 as 87.")
    if not 0 <= device.reserved_gib < device.memory_gib:
        raise TargetError(f"{where}: {device.reserved_gib} GiB cannot be reserved of {device.memory_gib} GiB of memory.")
    if device.bandwidth_gbs <= 0:
        raise TargetError(f"{where}: bandwidth_gbs = {device.bandwidth_gbs} is not a memory bandwidth in GB/s.")
    rising = all(small < large for small, large in zip(context.buckets, context.buckets[1:], strict=False))
    if not context.buckets or context.buckets[0] < 1 or not rising or context.max_batch < 1:
        raise TargetError(
            f"{where}: context buckets {context.buckets}, max_batch {context.max_batch}: buckets are rising numbers of tokens, "
            "and at least one row decodes."
        )
