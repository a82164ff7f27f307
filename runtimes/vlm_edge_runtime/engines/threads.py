"""How many threads a graph should get."""

from __future__ import annotations

import math
import os
from pathlib import Path

from vlm_edge_runtime.machine import physical_cores

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def default_threads() -> int:
    """Physical cores that this process may use: the machine's, cut to its CPU affinity and its container's quota."""
    cores = physical_cores() or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    if (quota := _quota(_CPU_MAX)) is not None:
        cores = min(cores, quota)
    return max(1, cores)


def _quota(file: Path) -> int | None:
    """Whole CPUs of a cgroup v2 limit ("max 100000" or "150000 100000" µs per period), rounded up; None: no limit known."""
    try:
        limit, period = file.read_text(encoding="ascii").split()
        return None if limit == "max" else max(1, math.ceil(int(limit) / int(period)))
    except (OSError, ValueError):
        return None
