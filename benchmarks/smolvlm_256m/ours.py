"""vlm-edge: `python -m benchmarks.smolvlm_256m.ours BUNDLE BUILD {steady|cold} {split|whole} RUNS`. No torch in here."""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

BEGAN = float(os.environ.get("BENCH_BEGAN", time.time()))

from vlm_edge_runtime import load  # noqa: E402 (clock first)

from .scenario import NEW_TOKENS, PROMPT, peak_rss_mb, picture, report  # noqa: E402


def main(bundle: Path, build: str, mode: str, split: bool, runs: int) -> None:
    """Measures one scenario and prints it."""
    options: dict[str, Any] = {"images": [picture()], "temperature": 0.0, "ignore_eos": True}
    with load(bundle, build=build, image_options={"do_image_splitting": split}) as vlm:
        if mode == "cold":
            vlm.generate(PROMPT, max_new_tokens=1, **options)
            report(cold_s=time.time() - BEGAN)
            return
        rows = []
        for _ in range(runs + 1):
            vlm.clear_caches()
            vlm.generate(PROMPT, max_new_tokens=NEW_TOKENS, **options)
            rows.append(vlm.stats.to_dict())
        kept = rows[1:]
        tiles = 17 if split else 1
        report(
            tiles=tiles,
            prompt_tokens=kept[0]["prompt_tokens"],
            vision_ms_per_tile=1e3 * statistics.median(row["vision_s"] for row in kept) / tiles,
            ttft_s=statistics.median(row["ttft_s"] for row in kept),
            decode_tps=statistics.median(row["decode_tps"] for row in kept),
            rss_mb=peak_rss_mb(),
            size_mb=vlm.memory()["weights"] / 1e6,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "split", int(sys.argv[5]))
