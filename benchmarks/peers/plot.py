"""The document as bars: one panel for each figure of speed. Needs matplotlib (the `bench` extra)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .goals import METRICS
from .report import label

SHOWN = ("vision_ms", "ttft_s", "prefill_longest_tps", "decode_short_tps", "decode_long_tps", "rss_mb", "cold_s", "turn_s")
OURS, PEER = "#c2410c", "#94a3b8"


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Writes the picture (PNG or SVG, by the name). Whiskers are least and most over the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [entry for entry in found["contenders"].values() if "rounds" in entry]
    metrics = [metric for metric in METRICS if metric.key in SHOWN and any(metric.key in entry for entry in entries)]
    columns = min(4, max(len(metrics), 1))
    rows = -(-max(len(metrics), 1) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.6 * columns, 1.2 + 0.32 * len(entries) * rows), squeeze=False)
    for index, axis in enumerate(axes.flat):
        if index >= len(metrics):
            axis.set_visible(False)
            continue
        metric = metrics[index]
        having = [entry for entry in entries if metric.key in entry][::-1]
        middle = [entry[metric.key]["median"] for entry in having]
        below = [entry[metric.key]["median"] - entry[metric.key]["min"] for entry in having]
        above = [entry[metric.key]["max"] - entry[metric.key]["median"] for entry in having]
        colours = [OURS if entry["ours"] else PEER for entry in having]
        places = list(range(len(having)))
        axis.barh(places, middle, color=colours, xerr=[below, above], error_kw={"elinewidth": 0.8, "capsize": 2})
        axis.set_yticks(places, [entry["label"] for entry in having], fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        better = "more is better" if metric.higher else "less is better"
        axis.set_title(f"{label(metric, found['job'])} ({better})", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{found['title']}; {found['machine']}; {found['date'][:10]}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
