"""Our side: bundles filled and built on the spot, and what a build takes for a picture, a prompt and each token. No PyTorch."""

from __future__ import annotations

import importlib
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_edge_runtime import DualEncoder, VisionLanguageModel, load
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.engines.ort_cuda import OrtCudaEngine
from vlm_edge_runtime.sessions.registry import SESSIONS, session_kind

from .stand_in import stand_in_place


def opened(bundle: Path, build: str, place: str, **options: Any) -> VisionLanguageModel | DualEncoder:
    """A session on the build's own device, or, for `place` "cpu", the CUDA engine's loop on the CPU provider."""
    if place != "cpu":
        return load(bundle, build=build, verify=False, **options)
    found = open_bundle(bundle, build=build, verify=False)
    module, name = SESSIONS[session_kind(found.manifest)]
    session: VisionLanguageModel | DualEncoder = getattr(importlib.import_module(module), name)(
        found, OrtCudaEngine(found, _place=stand_in_place()), **options
    )
    return session


def filled(bundle: str, parts: str) -> dict[str, Any]:
    """Fills a hollow bundle's `builds` or `portable` graphs with random weights."""
    from .models import fill_bundle

    began = time.perf_counter()
    made = fill_bundle(Path(bundle), "portable" if parts == "portable" else "builds")
    return {"seconds": time.perf_counter() - began, "bytes": sum(made.values()), "files": len(made)}


def built(bundle: str, target: str, name: str, precision: str | None = None, sm: int | None = None) -> dict[str, Any]:
    """`vlm-edge build`: the bundle's build `name` for `target`, with its engines where the target has some."""
    from vlm_edge.targets.backend import CompileOptions
    from vlm_edge.targets.build import build

    began = time.perf_counter()
    compiling = CompileOptions(sm=(sm,)) if sm else CompileOptions()
    made = build(bundle, target, precision=precision, name=name, overwrite=True, compiling=compiling)
    distances = {key: value for key, value in made.options.items() if key.endswith(".relative")}
    engines = [entry.builder_version for entry in made.engines]
    return {"seconds": time.perf_counter() - began, "backend": made.backend, "engines": engines, "relative": distances}


def ours(bundle: str, build: str, place: str, prompt_tokens: int, new_tokens: int, runs: int) -> dict[str, Any]:
    """Medians over `runs` answers about one picture of one tile, after one that is not counted."""
    began = time.perf_counter()
    total = prompt_tokens + new_tokens + 8
    with opened(Path(bundle), build, place, context_length=total) as session:
        assert isinstance(session, VisionLanguageModel)
        loaded = time.perf_counter() - began
        picture = random_picture()
        prompt = long_prompt(session, picture, prompt_tokens)
        rows = []
        for _ in range(runs + 1):
            session.clear_caches()
            session.generate(prompt, images=[picture], max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
            rows.append(session.stats.to_dict())
        engine = session._parts.engine
        uncaptured = engine.uncaptured if isinstance(engine, OrtCudaEngine) else None
    names = ("prompt_tokens", "new_tokens", "ttft_s", "preprocess_s", "vision_s", "prefill_s", "tpot_s")
    medians = {name: statistics.median(row[name] for row in rows[1:]) for name in names}
    return {**medians, "load_s": loaded, "first_s": rows[0]["ttft_s"], "uncaptured": uncaptured, "runs": runs}


def random_picture(size: int = 512) -> Image.Image:
    """A fixed picture of random pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def long_prompt(session: VisionLanguageModel, picture: Image.Image, tokens: int) -> str:
    """A text that makes, with the picture, a prompt of at least `tokens` tokens less one word's."""
    words, count = "look", 0
    while (count := len(session.prepare(words, images=[picture]).token_ids)) < tokens - 1:
        step = max(1, (tokens - count) // 2)
        longer = words + " look" * step
        if len(session.prepare(longer, images=[picture]).token_ids) > tokens:
            break
        words = longer
    return words
