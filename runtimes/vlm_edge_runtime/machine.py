"""What the machine has. psutil knows it everywhere; Linux says it itself, and importing psutil takes 15 ms of a cold start."""

from __future__ import annotations

from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_MEMORY = Path("/proc/meminfo")


def physical_cores() -> int | None:
    """Cores of the machine, of which each may run several threads. None: not known."""
    if found := _cores(_CPUS):
        return found
    import psutil

    return int(psutil.cpu_count(logical=False) or 0) or None


def available_memory() -> int:
    """Bytes that can be had without pushing anything out to a swap."""
    if found := _available(_MEMORY):
        return found
    import psutil

    return int(psutil.virtual_memory().available)


def _cores(cpus: Path) -> int:
    """Different sets of sibling threads that Linux names; 0 where it names none (older than 5.3, or another system).

    0, too, where one cannot be read: access is denied, or that core was taken offline meanwhile.
    """
    try:
        return len({file.read_bytes().strip() for file in cpus.glob("cpu[0-9]*/topology/core_cpus_list")})
    except OSError:
        return 0


def _available(file: Path) -> int:
    """`MemAvailable` in bytes; 0 where it does not stand."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
