"""Finding ONNX Runtime's shared library and making sure that the native extension speaks its C API correctly."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import threading
from pathlib import Path

import numpy as np

from vlm_edge_runtime import _native
from vlm_edge_runtime.errors import DeviceError

LIBRARY_VARIABLE = "VLM_EDGE_ONNXRUNTIME"
"""Environment variable with the path of another build of the library (a vendor's, on boards that PyPI does not serve)."""

MINIMUM = (1, 23)
"""The oldest version whose CPU provider has the standard `Attention` of opset 23, which portable graphs use."""

_INSTALL = "Install it with `pip install 'onnxruntime>=1.23'`, or set VLM_EDGE_ONNXRUNTIME to the path of libonnxruntime."
_PATTERNS = {"win32": "onnxruntime.dll", "darwin": "libonnxruntime*.dylib"}
_lock = threading.Lock()
_version: str | None = None


def find_library() -> Path:
    """Path of the shared library inside the installed `onnxruntime` package, which is not imported. Raises DeviceError."""
    if chosen := os.environ.get(LIBRARY_VARIABLE):
        if not Path(chosen).is_file():
            raise DeviceError(f"{LIBRARY_VARIABLE} names {chosen}, which is not a file.")
        return Path(chosen)
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        raise DeviceError(f"ONNX Runtime is not installed. {_INSTALL}")
    pattern = _PATTERNS.get(sys.platform, "libonnxruntime.so*")
    for location in spec.submodule_search_locations:
        if found := sorted((Path(location) / "capi").glob(pattern)):
            return found[-1]
    raise DeviceError(f"the onnxruntime package at {spec.submodule_search_locations[0]} has no capi/{pattern}. {_INSTALL}")


def ensure_runtime() -> str:
    """Opens the library once per process and tests it on a two-line graph; returns its version. Raises DeviceError."""
    global _version
    with _lock:
        if _version is None:
            version = _native.load_runtime(str(find_library()))
            check_version(version)
            _self_test(version)
            _version = version
        return _version


def check_version(version: str) -> None:
    """Raises DeviceError when the library is older than MINIMUM."""
    if version_tuple(version) < MINIMUM:
        raise DeviceError(f"ONNX Runtime {version} is too old, needed is {'.'.join(map(str, MINIMUM))} or newer. {_INSTALL}")


def version_tuple(version: str) -> tuple[int, ...]:
    """(major, minor) of "1.31.1"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _self_test(version: str) -> None:
    """The C API is called through numbered slots of a table: a wrong number must show here, not in somebody's answer."""
    session = _native.Session(_doubling_model(), "self-test")
    try:
        signature = (session.inputs, session.outputs)
        expected = ([("x", "float32", ("n", 3))], [("y", "float32", ("n", 3))])
        if signature != expected:
            raise DeviceError(
                f"ONNX Runtime {version} describes the self-test's graph as {signature}, expected {expected}. {_INSTALL}"
            )
        given = np.arange(6, dtype=np.float32).reshape(2, 3)
        result = np.asarray(session.run({"x": given})["y"])
        if result.shape != given.shape or not np.array_equal(result, given + given):
            raise DeviceError(f"ONNX Runtime {version} computed the self-test wrongly: {result!r}. {_INSTALL}")
    finally:
        session.close()


def _doubling_model() -> bytes:
    """The ONNX model y = x + x, x float32 [n, 3], in protobuf's wire format (field numbers of onnx.proto)."""

    def field(number: int, payload: bytes | int) -> bytes:
        if isinstance(payload, int):
            return bytes([number << 3, payload])
        return bytes([number << 3 | 2, len(payload)]) + payload

    def value(name: bytes) -> bytes:
        shape = field(1, field(2, b"n")) + field(1, field(1, 3))  # dim_param, dim_value
        tensor = field(1, 1) + field(2, shape)  # elem_type FLOAT
        return field(1, name) + field(2, field(1, tensor))

    node = field(1, b"x") + field(1, b"x") + field(2, b"y") + field(4, b"Add")
    graph = field(1, node) + field(2, b"double") + field(11, value(b"x")) + field(12, value(b"y"))
    return field(1, 8) + field(7, graph) + field(8, field(1, b"") + field(2, 17))  # ir_version 8, opset 17
