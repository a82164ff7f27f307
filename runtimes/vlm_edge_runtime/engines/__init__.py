"""Engines execute graphs. `open_engine` chooses one for a bundle and a device; `base` says what an engine must do."""

from __future__ import annotations

from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.errors import DeviceError

from .base import Decoder, DecoderState, Engine, EngineOptions, Graph, RowTokens, SamplingParams
from .native_ort import NativeOrtEngine
from .portable import PortableOrtEngine

__all__ = [
    "DEVICES",
    "Decoder",
    "DecoderState",
    "Engine",
    "EngineOptions",
    "Graph",
    "RowTokens",
    "SamplingParams",
    "open_engine",
]

DEVICES = ("auto", "cpu")
"""What `device` may be. "auto" takes the device that the bundle's build was made for."""

_PLANNED = ("cuda", "tensorrt", "tensorrt-rtx")
_CPU_BACKENDS = ("ort-cpu",)


def open_engine(bundle: Bundle, device: str = "auto", options: EngineOptions | None = None) -> Engine:
    """The engine for the bundle's chosen graphs on `device`; never silently another one.

    A decoder with a shared KV buffer gets the native token loop, one whose cache grows (the portable graphs) the reference
    loop in Python. Raises DeviceError for a device or a build that cannot run here.
    """
    if device not in DEVICES:
        known = f"this version runs on: {', '.join(DEVICES)}"
        if device in _PLANNED:
            raise DeviceError(
                f"device '{device}' has no engine in this version; {known}. "
                'Use device="cpu" with a bundle built for a cpu target (`vlm-edge build BUNDLE --target cpu-int4`).'
            )
        raise DeviceError(f"unknown device '{device}'; {known}.")
    build = bundle.build
    if build is not None and build.backend not in _CPU_BACKENDS:
        raise DeviceError(
            f"build '{build.name}' of {bundle.path} is for the backend '{build.backend}', this version runs: "
            f"{', '.join(_CPU_BACKENDS)}. Choose another build, or make one: `vlm-edge build {bundle.path} --target cpu-int4`."
        )
    kv = bundle.kv
    if kv is None or kv.shared_buffer:
        return NativeOrtEngine(bundle, options)
    return PortableOrtEngine(bundle, options)
