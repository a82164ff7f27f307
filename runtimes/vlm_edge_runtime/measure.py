"""Measures one build in a fresh process: `python -m vlm_edge_runtime.measure '{"bundle": …}'` prints one JSON object.

A process of its own makes cold start and peak memory honest: nothing of another build, of PyTorch or of the command line
is in it. The clock of the cold start begins in the caller, before the interpreter starts.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_edge_runtime import DualEncoder, VisionLanguageModel, load

FILLER = "the quick brown fox jumps over the lazy dog and "


def measure(
    bundle: str,
    *,
    build: str,
    image: str | None = None,
    prompt: str | None = None,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    runs: int = 5,
    threads: int = 0,
    began: float | None = None,
) -> dict[str, Any]:
    """Latency and memory of one build. Times are medians over `runs`; sizes are in 10⁶ bytes.

    `prompt_tokens` is how long a made-up text prompt is when no `prompt` is given (image tokens come on top); answers run
    to `new_tokens` whatever the model says, so that builds are compared on the same work.
    """
    start = time.time() if began is None else began
    picture = _picture(image)
    session = load(bundle, build=build, threads=threads)
    loaded = time.time()
    with session:
        result: dict[str, Any] = {"build": build, "load_s": loaded - start}
        if isinstance(session, DualEncoder):
            result |= _dual_encoder(session, picture, runs, start)
        else:
            result |= _generative(session, picture, prompt or _text(session, prompt_tokens), new_tokens, runs, start)
        result["graph_ms"] = {role: 1e3 * statistics.median(times) for role, times in session.graph_times().items() if len(times)}
        result["weights_mb"] = session.memory()["weights"] / 1e6
    result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    return result


def _generative(
    session: VisionLanguageModel, picture: Any, prompt: str, new_tokens: int, runs: int, start: float
) -> dict[str, Any]:
    rows = []
    cold = 0.0
    for run in range(runs + 1):
        session.clear_caches()
        session.generate(prompt, images=[picture], max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        stats = session.stats
        if run == 0:
            cold = time.time() - start - (stats.decode_s if stats.decode_s else 0.0)
        else:
            rows.append(stats.to_dict())
    names = ("vision_s", "ttft_s", "tpot_s", "prefill_tps", "decode_tps")
    median = {name: statistics.median(row[name] for row in rows) for name in names}
    # A second turn about the same picture: image features and the prompt's KV are there already.
    session.generate(prompt, images=[picture], max_new_tokens=1, temperature=0.0, ignore_eos=True)
    return {
        "cold_first_token_s": cold,
        "prompt_tokens": rows[-1]["prompt_tokens"],
        "vision_ms": 1e3 * median["vision_s"],
        "ttft_ms": 1e3 * median["ttft_s"],
        "ttft_again_ms": 1e3 * session.stats.ttft_s,
        "tpot_ms": 1e3 * median["tpot_s"],
        "prefill_tps": median["prefill_tps"],
        "decode_tps": median["decode_tps"],
    }


def _dual_encoder(session: DualEncoder, picture: Any, runs: int, start: float) -> dict[str, Any]:
    image, text = [], []
    cold = 0.0
    for run in range(runs + 1):
        session.clear_caches()
        began = time.perf_counter()
        session.embed_image(picture)
        between = time.perf_counter()
        session.embed_text("a photo of a robot on a table")
        if run == 0:
            cold = time.time() - start
        else:
            image.append(between - began)
            text.append(time.perf_counter() - between)
    return {
        "cold_first_embedding_s": cold,
        "image_ms": 1e3 * statistics.median(image),
        "text_ms": 1e3 * statistics.median(text),
    }


def _picture(image: str | None) -> Any:
    if image is not None:
        return Path(image)
    y, x = np.mgrid[0:512, 0:512].astype(np.float32) / 511
    waves = np.stack([np.sin(6 * x + 2 * y), np.cos(5 * y - x), np.sin(9 * x * y)], -1)
    return Image.fromarray(((waves + 1) * 127.5).astype(np.uint8))


def _text(session: VisionLanguageModel, tokens: int) -> str:
    text = FILLER
    while session.count_tokens(text) < tokens:
        text += FILLER
    while session.count_tokens(text) > tokens and " " in text:
        text = text.rsplit(" ", 1)[0]
    return text


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps(measure(arguments.pop("bundle"), **arguments)) + "\n")
