"""Engines execute graphs. `open_engine` chooses one for a bundle and a device; `base` says what an engine must do."""

from __future__ import annotations

import importlib

from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.errors import DeviceError

from .base import Decoder, DecoderState, Engine, EngineOptions, Graph, RowTokens, SamplingParams

__all__ = [
    "BACKENDS",
    "DEVICES",
    "Decoder",
    "DecoderState",
    "Engine",
    "EngineOptions",
    "Graph",
    "RowTokens",
    "SamplingParams",
    "import_engine",
    "open_engine",
]

BACKENDS: dict[str, tuple[str, str]] = {
    "ort-cpu": ("cpu", "cpu"),
    "ort-cuda": ("cuda", "ort_cuda"),
    "tensorrt": ("tensorrt", "tensorrt"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt"),
}
"""A build's backend → (the device that runs it, the module here whose `open_engine(bundle, options)` opens it)."""

DEVICES = ("auto", *dict.fromkeys(device for device, _ in BACKENDS.values()))
"""What `device` may be. "auto" takes the device that the bundle's build was made for."""

_PORTABLE = "ort-cpu"


def open_engine(bundle: Bundle, device: str = "auto", options: EngineOptions | None = None) -> Engine:
    """The engine for the bundle's chosen graphs on `device`; never silently another one. Portable graphs run on the CPU.

    Raises DeviceError for a device or a build that cannot run here.
    """
    if device not in DEVICES:
        raise DeviceError(f"unknown device '{device}'; this version runs on: {', '.join(DEVICES)}.")
    build = bundle.build
    backend = build.backend if build is not None else _PORTABLE
    if backend not in BACKENDS:
        raise DeviceError(
            f"build '{bundle.build_name}' of {bundle.path} is for the backend '{backend}', this version runs: "
            f"{', '.join(BACKENDS)}. Choose another build, or make one: `vlm-edge build {bundle.path} --target cpu-int4`."
        )
    own, module = BACKENDS[backend]
    if device not in ("auto", own):
        what = f"build '{build.name}'" if build is not None else "the portable form"
        raise DeviceError(
            f"{what} of {bundle.path} runs on device '{own}', '{device}' was asked for: pass device=\"{own}\", or a build made "
            f"for a target of '{device}' (`vlm-edge targets` lists them)."
        )
    engine: Engine = importlib.import_module(f".{module}", __package__).open_engine(bundle, options)
    return engine


def import_engine(bundle: Bundle) -> None:
    """Imports what `open_engine` will need. What cannot be imported is told by `open_engine`."""
    backend = bundle.build.backend if bundle.build is not None else _PORTABLE
    if backend == _PORTABLE:  # the libraries of the others are optional
        importlib.import_module(f".{BACKENDS[backend][1]}", __package__)
