"""ONNX Runtime on the CPU: the native token loop where the cache is one shared buffer, else the reference loop in Python."""

from __future__ import annotations

from vlm_edge_runtime import _native
from vlm_edge_runtime.bundle.reader import Bundle

from .base import Engine, EngineOptions
from .native_ort import NativeOrtEngine


def open_engine(bundle: Bundle, options: EngineOptions | None = None) -> Engine:
    """The engine for CPU builds and portable graphs.

    Raises DeviceError when ONNX Runtime is missing or too old, or a plan is of another version than this runtime's.
    """
    for role, entry in bundle.graphs.items():
        if entry.format == "plan":
            _native.check_plan(str(bundle.graph_path(role)))
    kv = bundle.kv
    if kv is None or kv.shared_buffer:
        return NativeOrtEngine(bundle, options)
    from .portable import PortableOrtEngine  # here and not above: most bundles never need it

    return PortableOrtEngine(bundle, options)
