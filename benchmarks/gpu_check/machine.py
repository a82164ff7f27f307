"""What the machine is and what it can do at most: device read bandwidth and matrix rate, measured with PyTorch."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings", "numpy")
_QUERY = "name,driver_version,memory.total,compute_cap,clocks.max.sm,clocks.max.memory,power.limit"


def facts(device: str) -> dict[str, Any]:
    """Everything about this machine; `device` "cuda" or "cpu" (then with tiny sizes, for the flow alone)."""
    import torch

    found: dict[str, Any] = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "packages": versions(),
        "nvidia_smi": nvidia_smi(),
        "device": device,
    }
    if device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit(f"PyTorch {torch.__version__} sees no GPU: {found['nvidia_smi']}")
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        found |= {
            "gpu": properties.name,
            "sm": 10 * properties.major + properties.minor,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": total,
            "free_bytes": free,
            "torch_cuda": torch.version.cuda,
        }
    else:
        found |= {"gpu": "none (CPU)", "sm": 0, "memory_bytes": 0}
    return found | {"read_bandwidth": _bandwidth(torch, device), "matrix_rate": _matrix_rate(torch, device)}


def versions() -> dict[str, str]:
    """Installed versions of what the check uses."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def nvidia_smi() -> str:
    """One line of nvidia-smi's CSV, or why there is none."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not there"
    done = subprocess.run(["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"], capture_output=True, text=True)
    return (done.stdout or done.stderr).strip().splitlines()[0] if done.stdout or done.stderr else "nvidia-smi says nothing"


def _bandwidth(torch: Any, device: str) -> float:
    """Bytes read per second: the largest value of an array far beyond the caches."""
    numbers = (2 << 30) // 4 if device == "cuda" else 1 << 22
    array = torch.ones(numbers, dtype=torch.float32, device=device)
    return float(array.nbytes / _median(torch, device, array.amax))


def _matrix_rate(torch: Any, device: str) -> float:
    """Floating point operations per second of a square matrix product: fp16 on a GPU, fp32 on a CPU."""
    size, dtype = (8192, torch.float16) if device == "cuda" else (256, torch.float32)
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return float(2 * size**3 / _median(torch, device, lambda: left @ right))


def _median(torch: Any, device: str, work: Callable[[], Any], runs: int = 20) -> float:
    """Median seconds of `work` after three calls that are not counted."""
    taken = []
    for number in range(runs + 3):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)
