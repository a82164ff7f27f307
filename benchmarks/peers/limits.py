"""What this machine allows: bytes read per second with all threads, operations per second in 8 bits and in float32.

The loops are those of benchmarks/kernels.c on threads of the runtime's own pool; they need gcc. A limit is the best that was
seen in any round, since everything that disturbs makes it smaller.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernels import aligned, library

READ_BYTES = 512 << 20
"""Far beyond the caches."""


@dataclass(slots=True, frozen=True)
class Limits:
    """Per second: bytes read, operations in 8 bits, operations in float32 (a multiplication and an addition are two)."""

    read: float
    int8: float
    fp32: float


def measure(threads: int, repeats: int = 5) -> Limits:
    """The best of `repeats` passes each. Raises RuntimeError without gcc or on a CPU whose peak loop nobody wrote."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            lib = library(Path(folder))
        except (OSError, ValueError) as error:
            raise RuntimeError(f"the loops that measure limits cannot be compiled: {error}") from None
        bench = lib.bench_open(threads, b"")
        data = aligned(READ_BYTES)
        read = max(READ_BYTES / lib.bench_read(bench, data.ctypes.data, READ_BYTES) for _ in range(repeats))
        int8, fp32 = (max(float(lib.bench_peak(bench, floats)) for _ in range(repeats)) for floats in (0, 1))
    if not int8 or not fp32:
        raise RuntimeError("benchmarks/kernels.c has no loop for the peak of this CPU's multipliers")
    return Limits(read, int8, fp32)


def best(rounds: Sequence[Limits]) -> Limits:
    """The best of each over the rounds."""
    return Limits(*(max(getattr(one, name) for one in rounds) for name in ("read", "int8", "fp32")))


def spread(rounds: Sequence[Limits], name: str) -> float:
    """How far the rounds are apart, as a share of their median."""
    values = [float(getattr(one, name)) for one in rounds]
    return (max(values) - min(values)) / statistics.median(values)
