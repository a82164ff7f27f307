"""`load()`: from a bundle's folder to a session that answers."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_edge_runtime.bundle.manifest import Manifest
from vlm_edge_runtime.bundle.reader import PORTABLE, begin_bundle, read_manifest
from vlm_edge_runtime.errors import BundleError, DeviceError, OptionError, TargetError

from .registry import SESSIONS, session_kind

if TYPE_CHECKING:
    from .dual_encoder import DualEncoder
    from .vision_language_model import VisionLanguageModel

BACKENDS: dict[str, tuple[str, ...]] = {
    "cpu": ("ort-cpu",),
    "cuda": ("ort-cuda",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx",),
}
"""Which builds' backends a device runs. "auto" is the first device here that the bundle has a build for."""
_EXAMPLES = {"cuda": "cuda-desktop", "tensorrt": "jetson-orin-nano", "tensorrt-rtx": "rtx-40"}
"""A target for each device that is not the CPU."""


def load(
    path: str | Path,
    *,
    device: str = "auto",
    build: str | None = None,
    threads: int = 0,
    encoder_threads: int = 0,
    spin: bool = True,
    context_length: int | None = None,
    image_cache_bytes: int = 256 << 20,
    prefix_cache: bool = True,
    prefix_cache_bytes: int = 512 << 20,
    image_options: Mapping[str, Any] | None = None,
    verify: bool = True,
) -> VisionLanguageModel | DualEncoder:
    """Loads a bundle. The class of the session follows from the bundle's family.

    - `device`: "cpu", "cuda", "tensorrt", "tensorrt-rtx" or "auto" (what the bundle has a build for). Never silently another.
    - `build`: a build's name, or "portable" for the reference graphs; by default the first build for the device.
    - `threads`: CPU threads, 0 for the number of physical cores.
    - `encoder_threads`: those of the graphs that are not the decoder's (vision encoder, projector …); 0 for as many as `threads`.
      Where images are encoded while an answer is decoded (`prefetch`, `watch`), both want the same cores: with `spin=False`, or,
      where there are enough of them, each with its share (`threads=2, encoder_threads=2` on 4). `python -m benchmarks.ahead`
      measures which pays on a machine.
    - `spin`: idle threads wait for the next piece of work without sleeping. Fastest on a machine of one's own; beside other
      busy processes switch it off, or every step waits for a thread that is not scheduled.
    - `context_length`: most tokens of prompt and answer together; by default what the model has.
    - `image_cache_bytes`: budget for the features of images (and videos …) seen before, and for what cross-attention reads of
      them; 0 keeps none.
    - `prefix_cache`, `prefix_cache_bytes`: whether KV caches of earlier calls are kept for prompts that begin like theirs, and
      how many bytes of them. The newest one is kept whatever its size.
    - `image_options`: options of the image processor in place of the saved ones, such as `{"do_image_splitting": False}` for
      one tile an image instead of many (SmolVLM), or `{"max_pixels": 401408}` (Qwen2-VL).
    - `verify`: whether every file is checked against its hash first.

    Raises BundleError (damaged or incomplete), TargetError (no such build, or none at all), DeviceError, OptionError.
    """
    budgets = {"image_cache_bytes": image_cache_bytes, "prefix_cache_bytes": prefix_cache_bytes}
    budgets |= {"threads": threads, "encoder_threads": encoder_threads}
    for name, value in budgets.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise OptionError(f"{name}={value!r} must be an integer, 0 or more.")
    manifest = read_manifest(path)
    if manifest.session not in SESSIONS:
        raise BundleError(f"{path} is of family '{manifest.family}'; this version runs: {', '.join(SESSIONS)}.")
    bundle, verification = begin_bundle(path, manifest, build=build or choose_build(path, manifest, device), verify=verify)
    with verification:
        # Here and not above: a caller that only wants the errors' names need not have them. Meanwhile the files are hashed.
        from vlm_edge_runtime import _native
        from vlm_edge_runtime.engines import EngineOptions, import_engine, open_engine
        from vlm_edge_runtime.text import load_tokenizer

        module, name = SESSIONS[session_kind(manifest)]
        session_class = getattr(importlib.import_module(module), name)
        import_engine(bundle)
        tokenizer = load_tokenizer(bundle)  # this holds the interpreter for long; hashing goes on
        _native.trim_heap()  # reading a tokenizer of 49,000 tokens leaves 27 MB of freed memory behind
        verification.wait()
    engine = open_engine(bundle, device, EngineOptions(threads=threads, spin=spin, encoder_threads=encoder_threads))
    given: dict[str, Any] = {"image_cache_bytes": image_cache_bytes, "image_options": image_options, "tokenizer": tokenizer}
    if hasattr(session_class, "generate"):
        given |= {"context_length": context_length, "prefix_cache": prefix_cache, "prefix_cache_bytes": prefix_cache_bytes}
    elif context_length is not None:
        engine.close()
        raise OptionError(f"context_length={context_length}: {path} generates no text, so it has no KV cache to size.")
    try:
        session: VisionLanguageModel | DualEncoder = session_class(bundle, engine, **given)
    except BaseException:
        engine.close()
        raise
    return session


def choose_build(path: str | Path, manifest: Manifest, device: str) -> str:
    """The name of the first build for a device, among several of engines the first with engines for the GPU that is here.

    Raises TargetError or DeviceError saying how to get one.
    """
    if device != "auto" and device not in BACKENDS:
        raise DeviceError(f"device '{device}' is not one this version runs on: {', '.join(('auto', *BACKENDS))}.")
    devices = tuple(BACKENDS) if device == "auto" else (device,)
    for each in devices:
        fitting = [name for name, build in manifest.builds.items() if build.backend in BACKENDS[each]]
        if fitting:
            return _for_this_gpu(manifest, fitting)
    target = _EXAMPLES.get(device, "cpu-int4")
    how = f"run `vlm-edge build {path} --target {target}`, or pass build='{PORTABLE}' (slow, and on the CPU: it is the reference)"
    if not manifest.builds:
        raise TargetError(f"{path}: this bundle has only portable graphs: {how}.")
    has = ", ".join(f"{name} ({build.backend})" for name, build in manifest.builds.items())
    raise TargetError(f"{path} has no build for device '{device}', only {has}: {how}.")


def _for_this_gpu(manifest: Manifest, names: Sequence[str]) -> str:
    engines = {name: {sm for one in manifest.builds[name].engines for sm in one.sm} for name in names}
    if len(names) > 1 and any(engines.values()):
        from vlm_edge_runtime.engines.cuda_driver import local_sm

        here = local_sm()
        return next((name for name, made in engines.items() if here in made), names[0])
    return names[0]
