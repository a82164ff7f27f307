"""Small plots as SVG text, coloured by the page's style sheet, so that they read in light and in dark and need no library.

All numbers are placed here; every word is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .report import short

Point = tuple[float, float]
KL_FLOOR = 1e-16
"""Below float64's own rounding every KL divergence is drawn as this."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of a bar chart: `value` and the `limit` it is judged by (None: not judged)."""

    label: str
    value: float
    limit: float | None
    verdict: str


def bars(items: Sequence[Bar], *, floor: float = 1e-9, title: str) -> str:
    """Horizontal bars on a logarithmic axis, each with a tick at its limit. Values below `floor` are drawn as none."""
    if not items:
        return ""
    left, width, row = 190, 640, 26
    height = row * len(items) + 34
    values = [item.value for item in items] + [item.limit for item in items if item.limit is not None]
    high = max([math.ceil(math.log10(min(max(value, floor), 1e6))) for value in values] + [-2])
    low = math.floor(math.log10(floor))

    def x(value: float) -> float:
        share = (math.log10(min(max(value, floor), 10.0**high)) - low) / (high - low)
        return left + share * (width - left - 80)

    parts = [_open(width, height, title)]
    for exponent in range(low, high + 1, 1 if high - low <= 10 else 2):
        at = x(10.0**exponent)
        parts.append(_line(at, 4, at, height - 26, "grid"))
        parts.append(_text(at, height - 10, _power(exponent), "axis", "middle"))
    for i, item in enumerate(items):
        y = 6 + row * i
        parts.append(_text(left - 10, y + 14, item.label, "label", "end"))
        length = max(x(item.value) - left, 1.5)
        kind = "unjudged" if item.limit is None and item.verdict == "PASS" else item.verdict.lower()
        parts.append(f'<rect class="bar {kind}" x="{left}" y="{y + 3}" width="{length:.1f}" height="15" rx="2"/>')
        parts.append(_text(left + length + 6, y + 15, short(item.value), "value", "start"))
        if item.limit is not None:
            parts.append(_line(x(item.limit), y, x(item.limit), y + 21, "limit"))
    parts.append("</svg>")
    return "".join(parts)


def steps(series: Sequence[Sequence[float]], marks: Sequence[tuple[int, int, str]], limit: float, *, title: str) -> str:
    """KL along the steps of several answers, logarithmic. `marks`: (series, step, class) drawn as dots. `limit`: a line."""
    longest = max((len(one) for one in series), default=0)
    if not longest:
        return ""
    left, width, top, bottom = 58, 640, 8, 262
    shown = [min(max(value, KL_FLOOR), 1e3) for one in series for value in one]
    low = math.floor(math.log10(min([*shown, limit])))
    high = max(math.ceil(math.log10(max([*shown, limit]))), low + 1)

    def place(step: int, value: float) -> Point:
        share = (math.log10(min(max(value, 10.0**low), 10.0**high)) - low) / (high - low)
        across = step / max(longest - 1, 1)
        return left + across * (width - left - 14), bottom - share * (bottom - top)

    parts = [_open(width, bottom + 34, title)]
    for exponent in range(low, high + 1, max(1, (high - low) // 6)):
        y = place(0, 10.0**exponent)[1]
        parts.append(_line(left, y, width - 14, y, "grid"))
        parts.append(_text(left - 6, y + 4, _power(exponent), "axis", "end"))
    y = place(0, limit)[1]
    parts.append(_line(left, y, width - 14, y, "limit"))
    parts.append(_text(width - 16, y + 13 if y < top + 14 else y - 4, "allowed mean", "axis", "end"))
    for i, one in enumerate(series):
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(step, value) for step, value in enumerate(one)))
        parts.append(f'<polyline class="line s{i % 6}" points="{points}"/>')
        parts += [
            f'<circle class="dot s{i % 6}" cx="{px:.1f}" cy="{py:.1f}" r="2"/>' for px, py in map(place, range(len(one)), one)
        ]
    for which, step, kind in marks:
        px, py = place(step, series[which][step])
        parts.append(f'<circle class="mark {kind}" cx="{px:.1f}" cy="{py:.1f}" r="5"/>')
    parts.append(_text((left + width) / 2, bottom + 26, "token of the reference's answer", "axis", "middle"))
    parts.append("</svg>")
    return "".join(parts)


def scatter(points: Sequence[Point], *, title: str, most: int = 1500) -> str:
    """Values of the reference (across) against ours (up), with the diagonal on which equal values lie."""
    if not points:
        return ""
    stride = max(1, len(points) // most)
    chosen = list(points)[::stride]
    left, size, top = 58, 300, 8
    values = [value for point in chosen for value in point]
    low, high = min(values), max(values)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def place(a: float, b: float) -> Point:
        span = size - 12
        return left + (a - low) / (high - low) * span, top + span - (b - low) / (high - low) * span

    parts = [_open(left + size, top + size + 26, title)]
    for tick in ticks:
        px, py = place(tick, tick)
        parts.append(_line(left, py, left + size - 12, py, "grid"))
        parts.append(_line(px, top, px, top + size - 12, "grid"))
        parts.append(_text(left - 6, py + 4, f"{tick:g}", "axis", "end"))
        parts.append(_text(px, top + size + 4, f"{tick:g}", "axis", "middle"))
    (ax, ay), (bx, by) = place(low, low), place(high, high)
    parts.append(_line(ax, ay, bx, by, "limit"))
    parts += [f'<circle class="point" cx="{px:.1f}" cy="{py:.1f}" r="1.8"/>' for px, py in (place(a, b) for a, b in chosen)]
    parts.append(_text(left + size / 2, top + size + 22, "reference", "axis", "middle"))
    parts.append("</svg>")
    return "".join(parts)


def _open(width: float, height: float, title: str) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" style="max-width:{width:g}px"><title>{escape(title)}</title>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, words: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _power(exponent: int) -> str:
    raised = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}"


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that cover the range."""
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]
