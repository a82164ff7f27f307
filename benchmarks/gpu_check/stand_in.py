"""A stand-in for the GPU, for rehearsals on a machine without one: the CUDA engine over the CPU provider and host memory.

The device is the one of the engines' tests, with the decode kernels compiled for the host (g++); so it takes a checkout.
"""

from __future__ import annotations

import functools
import importlib
import sys
import tempfile
from pathlib import Path

from vlm_edge_runtime.engines.cuda_device import Device
from vlm_edge_runtime.engines.ort_cuda_place import Place, host_place

_TESTS = Path(__file__).resolve().parents[2] / "tests" / "runtimes" / "engines"


def stand_in_place() -> Place:
    """The CPU provider in the GPU's place. Raises FileNotFoundError outside a checkout."""
    if not _TESTS.is_dir():
        raise FileNotFoundError(f"{_TESTS} is missing: rehearsals on the CPU need the checkout, not the installed package")
    device: Device = _parts()[0](_parts()[1], Path(tempfile.mkdtemp(prefix="vlm-edge-stand-in-")))
    return host_place(device)


@functools.cache
def _parts() -> tuple[type, object]:
    """(the device's class, the compiled kernels)."""
    if str(_TESTS) not in sys.path:
        sys.path.append(str(_TESTS))
    kernels = importlib.import_module("host_kernels").HostKernels(Path(tempfile.mkdtemp(prefix="vlm-edge-kernels-")))
    return importlib.import_module("host_device").PromptDevice, kernels
