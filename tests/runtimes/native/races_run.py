"""Whole sessions on each number of threads, the same tokens from all: `races_run.py BUNDLE THREADS...`, for ThreadSanitizer too.

Drafted decoding, cameras and inputs encoded ahead, the executors of both kinds of plan on several threads, several callers, and
calls that are cancelled or closed from another thread. A program of its own: torch knows no sanitizers.
"""

from __future__ import annotations

import sys
import threading
from contextlib import suppress

import numpy as np
from PIL import Image

from vlm_edge_runtime import DeviceError, GenerationCancelled, load

ASK = "what do you see?"
AGAIN = "red circle, blue square. red circle, blue square. red circle, blue square. red circle,"
OPTIONS = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 0.0}
LOOKUP = {**OPTIONS, "prompt_lookup_num_tokens": 8}


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def answers(vlm) -> list[list[int]]:
    """Tokens of what is asked in turn: one answer, a batch, drafts, frames of a camera."""
    found = [vlm.generate(ASK, images=picture(0), **OPTIONS).tokens]
    found += [one.tokens for one in vlm.generate([ASK, AGAIN], images=[picture(1), picture(2)], **LOOKUP)]
    found += [vlm.generate(AGAIN, images=[picture(3), picture(4)], **LOOKUP).tokens]
    assert vlm.stats.drafted_tokens
    ahead = [vlm.prefetch(picture(seed)) for seed in (5, 6)]
    found += [vlm.generate(ASK, images=one, **LOOKUP).tokens for one in ahead]
    with vlm.watch([picture(seed) for seed in range(7, 10)], ASK, drop=False, **LOOKUP) as seen:
        found += [answer.answer.tokens for answer in seen]
    return found


def together(vlm) -> None:
    """Callers that encode and decode at once; one that is cancelled; one session that is closed while another call runs."""
    expected = vlm.generate(ASK, images=picture(20), **LOOKUP).tokens
    wrong = []

    def ask(seed: int) -> None:
        for _ in range(2):
            vlm.embed_image(picture(seed))
            if vlm.generate(ASK, images=picture(20), **LOOKUP).tokens != expected:
                wrong.append(seed)

    callers = [threading.Thread(target=ask, args=(seed,)) for seed in (30, 31)]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    assert not wrong
    stop = threading.Event()
    pieces = vlm.stream(ASK, images=picture(21), **{**OPTIONS, "max_new_tokens": 60})
    next(iter(pieces))
    pieces.close()
    late = [vlm.prefetch(picture(seed)) for seed in (40, 41)]
    closing = threading.Thread(target=lambda: (stop.wait(5), vlm.close()))
    closing.start()
    stop.set()
    with suppress(DeviceError, GenerationCancelled):
        vlm.generate(ASK, images=late, **{**LOOKUP, "max_new_tokens": 60})
    closing.join()


def main() -> None:
    right = None
    for threads in map(int, sys.argv[2:]):
        vlm = load(sys.argv[1], threads=threads, spin=threads % 3 != 0, image_cache_bytes=0, prefix_cache=threads % 2 == 0)
        found = answers(vlm)
        right = right or found
        assert found == right, (threads, found, right)
        together(vlm)
    print("ran", flush=True)


if __name__ == "__main__":
    main()
