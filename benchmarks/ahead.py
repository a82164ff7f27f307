"""What looking ahead saves: drafts of tokens that repeat, and the next picture encoded while an answer is decoded.

    python -m benchmarks.ahead BUNDLE [--build NAME] [--frames 12] [--tokens 32] [--rounds 5] [--out FILE]

First what a draft costs: one pass over a row's newest token with 1, 2, 4 … refused tokens after it, in units of a plain step;
from that, from how many accepted tokens on a draft pays. Then frames answered one after the other against `watch`, whose next
frame is encoded meanwhile, with the threads shared or divided. All variants take turns within each round; medians over rounds.
Steps are compared by processor time at one thread, whole answers by the clock: those figures need a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from vlm_edge_runtime import VisionLanguageModel, load
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.engines import EngineOptions, SamplingParams, open_engine
from vlm_edge_runtime.engines.base import VerifyingState

DRAFTS = (1, 2, 4, 8, 11)
ASK = "What do you see?"


def draft_costs(path: Path, build: str, context: int, rounds: int) -> dict[int, float]:
    """Drafted tokens → median of processor time of a pass with so many refused tokens over that of a plain step, one thread."""
    decoder = open_engine(open_bundle(path, build=build), options=EngineOptions(threads=1, spin=False)).decoder()
    state = cast(VerifyingState, decoder.allocate(1, context + 16))
    ids = np.random.default_rng(0).integers(3, 100, context)
    state.prefill(0, decoder.embed(ids), np.arange(context))
    state.start(0, SamplingParams(), ids, context)
    newest = state.decode(1)[0].tokens[0]
    plain = state.decode(1)[0].tokens[0]
    wrong = (plain + 1) % decoder.vocab_size

    def seconds(draft: Sequence[int]) -> float:
        state.truncate(0, context)
        state.prefill(0, decoder.embed(np.array([newest])), np.array([context]))
        state.start(0, SamplingParams(), ids, context + 1)
        state.decode(1)
        begin = time.process_time()
        state.verify([draft])
        return time.process_time() - begin

    ratios: dict[int, list[float]] = {count: [] for count in DRAFTS}
    for _ in range(rounds):
        for count in DRAFTS:
            base = seconds([])
            ratios[count].append(seconds([wrong] * count) / base)
    state.close()
    return {count: statistics.median(found) for count, found in ratios.items()}


def pictures(count: int, size: int) -> list[Image.Image]:
    """Pictures that have nothing in common."""
    random = np.random.default_rng(1)
    return [Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def frame_rates(chosen: argparse.Namespace) -> dict[str, float]:
    """How frames are answered → median of frames a second."""
    cores, count = chosen.cores, chosen.frames
    options: dict[str, Any] = {"max_new_tokens": chosen.tokens, "ignore_eos": True, "temperature": 0.0}
    half = max(1, cores // 2)
    # Nothing is kept between rounds: every frame is encoded, and every prompt run, anew.
    common: dict[str, Any] = {"build": chosen.build, "prefix_cache": False, "image_cache_bytes": 0}
    common |= {"image_options": {"do_image_splitting": False}} if chosen.one_tile else {}
    sessions = {
        "all threads": load(chosen.bundle, threads=cores, **common),
        "all threads, no spinning": load(chosen.bundle, threads=cores, spin=False, **common),
        "divided": load(chosen.bundle, threads=half, encoder_threads=max(1, cores - half), spin=False, **common),
    }
    frames = pictures(count, chosen.size)

    def after(vlm: VisionLanguageModel) -> None:
        for frame in frames:
            vlm.generate(ASK, images=frame, **options)

    def ahead(vlm: VisionLanguageModel) -> None:
        with vlm.watch(frames, ASK, drop=False, **options) as seen:
            assert sum(1 for _ in seen) == count

    variants: dict[str, tuple[Callable[[VisionLanguageModel], None], VisionLanguageModel]] = {}
    for name, session in sessions.items():
        vlm = cast(VisionLanguageModel, session)
        vlm.generate(ASK, images=frames[0], **options)
        if name != "divided":
            variants[f"one after the other, {name}"] = (after, vlm)
        variants[f"next frame encoded meanwhile, {name}"] = (ahead, vlm)
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(chosen.rounds):
        for name, (run, vlm) in variants.items():
            begin = time.perf_counter()
            run(vlm)
            found[name].append(count / (time.perf_counter() - begin))
    for session in sessions.values():
        session.close()
    return {name: statistics.median(rates) for name, rates in found.items()}


def main() -> None:
    """Prints both tables, and writes them to a file where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--build", default="cpu-int4")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--size", type=int, default=512, help="Pixels along each side of a frame.")
    parser.add_argument("--one-tile", action="store_true", help="SmolVLM: one tile a frame instead of many.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("drafts", "frames"))
    parser.add_argument("--out", type=Path, help="Where to write what is printed.")
    chosen = parser.parse_args()
    lines: list[str] = []
    if chosen.only != "frames":
        lines.append(f"A pass with refused drafts, in plain steps (context {chosen.context}, processor time, one thread):")
        for count, ratio in draft_costs(chosen.bundle, chosen.build, chosen.context, 4 * chosen.rounds).items():
            lines.append(f"  {count:2d} drafted: {ratio:5.2f}, so it pays from {max(0.0, ratio - 1):.1f} accepted on")
    if chosen.only != "drafts":
        rates = frame_rates(chosen)
        base = next(iter(rates.values()))
        lines.append(f"Frames a second, {chosen.tokens} tokens each, {chosen.cores} cores:")
        for name, rate in rates.items():
            lines.append(f"  {rate:7.3f}  {rate / base:5.2f} ×  {name}")
    print("\n".join(lines))
    if chosen.out is not None:
        chosen.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
