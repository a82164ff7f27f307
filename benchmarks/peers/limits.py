"""What this machine allows: bytes read per second with all threads, operations per second in 8 bits, bfloat16 and float32.

The loops are those of benchmarks/kernels.c on threads of the runtime's own pool; they need gcc. A limit is the best that was
seen in any round, since everything that disturbs makes it smaller.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernels import aligned, library

READ_BYTES = 512 << 20
"""Far beyond the caches."""


@dataclass(slots=True, frozen=True)
class Limits:
    """Per second: bytes read; operations in 8 bits, in float32, in bfloat16 (a multiplication and an addition are two).

    `bf16` is 0 where the CPU has no dot product of bfloat16, or no loop is written for it.
    """

    read: float
    int8: float
    fp32: float
    bf16: float = 0.0

    def peak(self, arithmetic: str | None) -> float | None:
        """Operations per second of `int8`, `bf16` or `fp32`; None where that is not measured here."""
        return getattr(self, arithmetic) or None if arithmetic in ("int8", "bf16", "fp32") else None


class Meter:
    """The loops, compiled once. Raises RuntimeError without gcc or on a CPU whose peak loop nobody wrote."""

    def __init__(self, threads: int) -> None:
        with tempfile.TemporaryDirectory() as folder:  # the library stays mapped when its file is gone
            try:
                self._library = library(Path(folder))
            except (OSError, subprocess.SubprocessError) as error:
                raise RuntimeError(f"the loops that measure limits cannot be compiled: {error}") from None
        for kernels in (b"", b"avx512", b"avx2"):  # the best kernels may have a name that no peak loop is written for
            self._bench = self._library.bench_open(threads, kernels)
            if self._bench and self._library.bench_peak(self._bench, 0):
                return
        raise RuntimeError("benchmarks/kernels.c has no loop for the peak of this CPU's multipliers")

    def measure(self, repeats: int = 5) -> Limits:
        """The best of `repeats` passes each. The threads sleep afterwards, the memory is given back."""
        data, lib = aligned(READ_BYTES), self._library
        read = max(READ_BYTES / lib.bench_read(self._bench, data.ctypes.data, READ_BYTES) for _ in range(repeats))
        int8, fp32, bf16 = (max(float(lib.bench_peak(self._bench, kind)) for _ in range(repeats)) for kind in (0, 1, 2))
        return Limits(read, int8, fp32, bf16)


def best(rounds: Sequence[Limits]) -> Limits:
    """The best of each over the rounds."""
    return Limits(*(max(getattr(one, name) for one in rounds) for name in ("read", "int8", "fp32", "bf16")))
