"""The document on a terminal: medians alone, and the goals; the files hold the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from .goals import METRICS
from .report import said

HEADS = {
    "vision_ms": "vision\nms/tile",
    "prefill_short_tps": "prefill\nshort tok/s",
    "prefill_longest_tps": "prefill\nlong tok/s",
    "ttft_s": "TTFT\ns",
    "decode_short_tps": "decode\nshort tok/s",
    "decode_long_tps": "decode\nlong tok/s",
    "turn_s": "turn 2\ns",
    "rss_mb": "RSS\nMB",
    "size_mb": "disk\nMB",
    "cold_s": "cold\ns",
}
_COLOUR = {True: "green", False: "red", None: "yellow"}


def show(found: Mapping[str, Any], console: Console) -> None:
    """Prints both tables."""
    shown = [m for m in METRICS if m.key in HEADS and any(m.key in entry for entry in found["contenders"].values())]
    table = Table(title=f"{found['title']}, medians of {found['rounds']} rounds", show_lines=False, header_style="bold")
    table.add_column("")
    for metric in shown:
        table.add_column(HEADS[metric.key], justify="right")
    for entry in found["contenders"].values():
        if "rounds" not in entry:
            table.add_row(f"[dim]{entry['label']}[/]", *(["[dim]failed[/]"] if "failed" in entry else []))
            continue
        cells = [format(entry[metric.key]["median"], metric.form) if metric.key in entry else "–" for metric in shown]
        table.add_row(f"[bold]{entry['label']}[/]" if entry["ours"] else entry["label"], *cells)
    console.print(table)
    for entry in found["contenders"].values():
        if "failed" in entry:
            console.print(f"[yellow]{entry['label']}[/]: {entry['failed']}", markup=True)
    if found["goals"]:
        _goals(found, console)


def _goals(found: Mapping[str, Any], console: Console) -> None:
    table = Table(title="Goals", header_style="bold")
    for head in ("", "ours", "best peer", "×", "% limit", "goal", "", "stretch", ""):
        table.add_column(head, overflow="fold")
    for goal in found["goals"]:
        ours, peer = (
            ("–" if value is None else format(value, goal["form"])) for value in (goal["ours"], goal["best_peer_value"])
        )
        ratio = "–" if goal["ratio"] is None else f"{goal['ratio']['median']:.2f}"
        share = "–" if goal["share"] is None else f"{100 * goal['share']['median']:.0f}"
        verdict = f"[{_COLOUR[goal['met']]}]{said(goal['met'])}[/]"
        further = f"[{_COLOUR[goal['stretch_met']]}]{said(goal['stretch_met'])}[/]" if goal["stretch"] else ""
        table.add_row(
            goal["figure"],
            ours,
            f"{peer} {goal['best_peer'] or ''}",
            ratio,
            share,
            goal["goal"],
            verdict,
            goal["stretch"],
            further,
        )
    console.print(table)
