"""What every contender does: the same picture, the same prompt, the same number of new tokens. No torch in here."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NEW_TOKENS = 128
PROMPT = "Describe what the robot should pick up from the table first and say why."


def picture() -> Image.Image:
    """A fixed 512 × 512 RGB picture: smooth colours, so that no decoder or resizer is favoured."""
    y, x = np.mgrid[0:512, 0:512].astype(np.float32) / 511
    waves = [np.sin(6 * x + 2 * y), np.cos(5 * y - x), np.sin(9 * x * y)]
    return Image.fromarray(((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8))


def median_seconds(work: Callable[[], Any], runs: int) -> float:
    """Median wall time of `work` over `runs` calls, after one that is not counted."""
    work()
    taken = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def peak_rss_mb() -> float:
    """The process's largest resident set so far, in 10⁶ bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def folder_mb(*paths: Path) -> float:
    """Bytes on disk of files and folders, in 10⁶."""
    files = [f for p in paths for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file()]
    return sum(f.stat().st_size for f in files) / 1e6


def report(**values: Any) -> None:
    """The one line a contender prints."""
    sys.stdout.write("RESULT " + json.dumps(values) + "\n")
    sys.stdout.flush()
