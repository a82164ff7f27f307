"""The CUDA driver through NVIDIA's cuda-bindings, loaded when asked for; and one clear error for each way it can be missing."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from vlm_edge_runtime.errors import DeviceError

INSTALL = "Install it with `pip install 'vlm-edge[gpu]'`."


def driver() -> ModuleType:
    """`cuda.bindings.driver`. Raises DeviceError when cuda-bindings is not installed."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise DeviceError(f"cuda-bindings, through which the GPU is reached, cannot be imported ({error}). {INSTALL}") from None


def bindings_version() -> tuple[int, int]:
    """The CUDA version that the installed cuda-bindings is made for."""
    version = str(importlib.import_module("cuda.bindings").__version__).split(".")
    return int(version[0]), int(version[1])


def open_driver() -> int:
    """Initialises the driver; its CUDA version as 1000 · major + 10 · minor. Raises DeviceError: no driver, no GPU, too old."""
    api = driver()
    try:
        result = api.cuInit(0)
    except Exception as error:  # cuda-bindings raises classes of its own for a library that is not there
        raise DeviceError(
            f"this machine has no NVIDIA driver ({str(error).splitlines()[0]}): a GPU build runs on the GPU it was built for; "
            'here use device="cpu" with a build for a cpu target.'
        ) from None
    if result[0] != api.CUresult.CUDA_SUCCESS:
        name = _error_name(result[0])
        if name == "CUDA_ERROR_NO_DEVICE":
            raise DeviceError(
                "the NVIDIA driver finds no GPU here (CUDA_ERROR_NO_DEVICE): see `nvidia-smi` and CUDA_VISIBLE_DEVICES, or use "
                'device="cpu" with a build for a cpu target.'
            )
        raise DeviceError(f"the NVIDIA driver cannot be initialised: {name}. See `nvidia-smi`.")
    version = int(checked("cuDriverGetVersion", api.cuDriverGetVersion()))
    major, _ = bindings_version()
    if version // 1000 < major:
        raise DeviceError(
            f"the NVIDIA driver is too old: it serves CUDA {version // 1000}.{version % 1000 // 10}, the installed cuda-bindings "
            f"need CUDA {major}: update the driver, or install `cuda-bindings<{major}` with the packages that go with it."
        )
    return version


def compute_capability(api: ModuleType, device: Any) -> int:
    """A GPU's compute capability × 10 (8.6 is 86)."""
    kinds = api.CUdevice_attribute
    major = kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    minor = kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
    digits = [int(checked("cuDeviceGetAttribute", api.cuDeviceGetAttribute(which, device))) for which in (major, minor)]
    return 10 * digits[0] + digits[1]


def local_sm() -> int | None:
    """The first GPU's compute capability × 10; None where there is none that can be used."""
    try:
        api = driver()
        open_driver()
        return compute_capability(api, checked("cuDeviceGet", api.cuDeviceGet(0)))
    except DeviceError:
        return None


def checked(call: str, result: Any) -> Any:
    """What a driver call gave besides its status (one value, or nothing). Raises DeviceError naming call and status."""
    if int(result[0]) != 0:
        raise DeviceError(f"{call} failed: {_error_name(result[0])}.")
    return result[1] if len(result) > 1 else None


def _error_name(status: Any) -> str:
    return str(getattr(status, "name", status))
