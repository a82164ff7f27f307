"""What this machine allows: bytes read per second with all threads, operations per second in 8 bits, bfloat16 and float32.

The loops are those of benchmarks/limits.c on threads of the runtime's own pool; they need gcc. The speed of a virtual machine
changes within minutes, so the limits are read directly before and after each contender's process, and what that process did is
held against the better of the two: everything that disturbs makes a reading smaller.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.kernels import aligned, compiled

READ_BYTES = 256 << 20
"""Beyond the caches."""
READ_LOOPS = 3
"""`ReadLoop` of benchmarks/limits.h: plain, asking ahead, four streams. Medians of 40 passes each in turn on one thread of an AMD
EPYC: with pages of 2 MB, as here, the other two are 2 to 3 % faster than the plain one, with pages of 4 kB 15 to 28 %."""
READING_S = 0.3
"""How long the loops of one reading run, half of it those that read. A longer one is farther from the process that it stands
beside, and the machine's state lasts less than a second at times."""
READING = (
    f"each reading lasts {READING_S} s and counts the best pass of a loop; bytes are read by three loops in turn, one plain, one "
    "that asks ahead, one of four streams. So short a reading may miss the machine's best: in the median of 8 in turn with "
    "readings of 2 s (AMD EPYC, one thread by its processor time, beside other work) it had 93 % of their bandwidth and 99 % of "
    "their peaks, the better of two 96 % and 99.6 %. Against such longer readings a share of the bandwidth would be some 4 % of "
    "itself smaller"
)
"""For the page: what a limit is, and what that flatters."""


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
                library = compiled(Path(folder))
            except (OSError, subprocess.SubprocessError) as error:
                raise RuntimeError(f"the loops that measure limits cannot be compiled: {error}") from None
        size, pointer = ctypes.c_size_t, ctypes.c_void_p
        library.limits_open.restype, library.limits_open.argtypes = pointer, [size]
        library.limits_read.restype, library.limits_read.argtypes = ctypes.c_double, [pointer, pointer, size, ctypes.c_int]
        library.limits_peak.restype, library.limits_peak.argtypes = ctypes.c_double, [pointer, ctypes.c_char_p, ctypes.c_int]
        self._library, self._open = library, library.limits_open(threads)
        if not self._open:
            raise RuntimeError(f"no {threads} threads can be started to measure the machine's limits")
        if not self._peak(0):
            raise RuntimeError("benchmarks/limits.c has no loop for the peak of this CPU's multipliers")

    def _peak(self, kind: int) -> float:
        return float(self._library.limits_peak(self._open, b"", kind))

    def measure(self, seconds: float = READING_S) -> Limits:
        """The best pass of each loop within its part of `seconds`. The threads sleep afterwards, the memory is given back."""
        data, lib = aligned(READ_BYTES), self._library

        def least() -> float:
            return min(float(lib.limits_read(self._open, data.ctypes.data, READ_BYTES, loop)) for loop in range(READ_LOOPS))

        read = _best(lambda: READ_BYTES / least(), seconds / 2)
        int8, fp32, bf16 = (_best(partial(self._peak, kind), seconds / 6) for kind in (0, 1, 2))
        return Limits(read, int8, fp32, bf16)


def _best(work: Callable[[], float], seconds: float) -> float:
    """The most of as many passes as begin within `seconds`; two at least, since the first wakes the threads. 0 ends it."""
    until, found = time.perf_counter() + seconds, float(work())
    while found:
        found = max(found, float(work()))
        if time.perf_counter() >= until:
            break
    return found


def best(readings: Sequence[Limits]) -> Limits | None:
    """The best of each; None of nothing."""
    if not readings:
        return None
    return Limits(*(max(getattr(one, name) for one in readings) for name in ("read", "int8", "fp32", "bf16")))
