"""The document as bars: one panel for each figure, contenders in the same order in all. Needs matplotlib (the `bench` extra)."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .goals import METRICS, Metric
from .report import label

SHOWN = ("vision_ms", "ttft_s", "prefill_longest_tps", "decode_short_tps", "decode_long_tps", "turn_s", "cold_s", "rss_mb")
OURS, BEST, PEER = "#c2410c", "#64748b", "#cbd5e1"
"""Ours, the best peer of a panel, the others."""
COLOURS = 64
"""Of the PNG's palette: bars and letters need no more, and the file stays small."""


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Writes the picture (a PNG). A bar is the median, a whisker least and most over the rounds.

    Beside it stand the number, how many times better than the best peer that is, and the percent of the limit where one is known:
    medians of what the rounds gave, each taken by itself.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    entries = [entry for entry in found["contenders"].values() if "rounds" in entry]
    metrics = sorted(
        (m for m in METRICS if m.key in SHOWN and any(m.key in e for e in entries)), key=lambda m: SHOWN.index(m.key)
    )
    columns = min(4, max(len(metrics), 1))
    rows = -(-max(len(metrics), 1) // columns)
    size = (1.6 + 3.3 * columns, 1.1 + (0.9 + 0.34 * len(entries)) * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, sharey=True)
    for index, axis in enumerate(axes.flat):
        if index < len(metrics):
            _panel(axis, metrics[index], entries, label(metrics[index], found["job"]))
        else:
            axis.set_visible(False)
    for row in axes:
        _names(row[0], entries)
    figure.suptitle(f"{found['title']}, {found['date'][:10]}", x=0.01, ha="left", fontsize=13, fontweight="bold")
    text = f"{found['machine'].split(', Linux')[0]}. × how many times better than the best peer (dark grey)"
    text += "; % of what the machine allows: medians of the rounds' ratios."
    figure.text(0.01, 1 - 0.46 / size[1], text, fontsize=9, color="#475569", va="top")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.55 / size[1]), w_pad=1.2, h_pad=1.6)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    pyplot.close(figure)
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)


def _panel(axis: Any, metric: Metric, entries: Sequence[Mapping[str, Any]], title: str) -> None:
    figures = [entry.get(metric.key) for entry in entries]
    most = max(figure["max"] for figure in figures if figure)
    for place, (entry, figure) in enumerate(zip(entries, figures, strict=True)):
        if figure is None:
            axis.text(0.01 * most, place, "–", va="center", fontsize=9, color="#64748b")
            continue
        middle, ratio = figure["median"], figure.get("of_best_peer", {}).get("median")
        colour = OURS if entry["ours"] else BEST if ratio == 1 else PEER
        spread = [[middle - figure["min"]], [figure["max"] - middle]]
        kept = {"elinewidth": 0.8, "capsize": 2, "ecolor": "#334155"}
        axis.barh(place, middle, height=0.72, color=colour, xerr=spread, error_kw=kept)
        words = format(middle, metric.form) + (f"  ×{ratio:.2f}" if ratio is not None else "")
        words += f"  {100 * figure['share']['median']:.0f} %" if "share" in figure else ""
        bold = "bold" if entry["ours"] else "normal"
        axis.text(figure["max"] + 0.02 * most, place, words, va="center", fontsize=8.5, fontweight=bold, color="#0f172a")
    axis.set_xlim(0, 1.75 * most)
    axis.set_ylim(len(entries) - 0.5, -0.5)
    axis.set_xticks([])
    axis.tick_params(axis="y", length=0)
    better = "more is better" if metric.higher else "less is better"
    axis.set_title("\n".join(textwrap.wrap(title, 36)) + f"\n({better})", fontsize=9.5, loc="left")
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def _names(axis: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    axis.set_yticks(range(len(entries)), [entry["label"] for entry in entries], fontsize=9)
    for name, entry in zip(axis.get_yticklabels(), entries, strict=True):
        if entry["ours"]:
            name.set_color(OURS)
            name.set_fontweight("bold")
