"""The figures, and what is to be reached: one table of metrics, one of goals; whether a goal is met is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

OURS = "ours-int4"
"""The build that the goals are about."""
Row = Mapping[str, Any]


@dataclass(slots=True, frozen=True)
class Metric:
    """A column. `share`: which limit bounds it, if one does."""

    key: str
    label: str
    form: str
    higher: bool
    share: Literal["decode", "prefill", "vision"] | None = None


METRICS = (
    Metric("vision_ms", "vision, ms a tile", ".0f", False, "vision"),
    Metric("prefill_short_tps", "prefill, {short} tokens, tok/s", ".0f", True, "prefill"),
    Metric("prefill_longest_tps", "prefill, {longest} tokens, tok/s", ".0f", True, "prefill"),
    Metric("ttft_s", "TTFT, {tiles} + {others} tokens, s", ".3f", False),
    Metric("decode_short_tps", "decode at {short_context}, tok/s", ".1f", True, "decode"),
    Metric("decode_long_tps", "decode at {long_context}, tok/s", ".1f", True, "decode"),
    Metric("turn_s", "second turn, s", ".3f", False),
    Metric("rss_mb", "peak RSS, image prompt, MB", ".0f", False),
    Metric("rss_long_mb", "peak RSS, all prompts, MB", ".0f", False),
    Metric("size_mb", "on disk, MB", ".0f", False),
    Metric("cold_s", "cold start to first token, s", ".2f", False),
)


@dataclass(slots=True, frozen=True)
class Goal:
    """`ratio`: how many times better than the best peer; `share`: of the limit; `stretch_…`: beyond. `within_mb`: above the

    artefact and the KV cache. A goal without a figure of either side is not measured.
    """

    metric: str
    models: tuple[str, ...]
    tiles: int
    ratio: float | None = None
    share: float | None = None
    stretch_ratio: float | None = None
    stretch_share: float | None = None
    within_mb: float | None = None


GOALS = (
    Goal("decode_short_tps", ("256m",), 1, ratio=2, share=0.60, stretch_share=0.80),
    Goal("decode_short_tps", ("2b",), 1, ratio=1.2, share=0.75, stretch_share=0.90),
    Goal("prefill_short_tps", ("256m",), 1, ratio=1.3, stretch_share=0.60),
    Goal("prefill_longest_tps", ("256m",), 1, ratio=1.35, stretch_share=0.60),
    Goal("vision_ms", ("256m",), 1, ratio=1.3, stretch_share=0.80),
    Goal("ttft_s", ("256m",), 1, ratio=1.5, stretch_ratio=2),
    Goal("ttft_s", ("256m",), 17, ratio=1.5, stretch_ratio=2),
    Goal("rss_mb", ("256m",), 1, ratio=1, within_mb=60),
    Goal("cold_s", ("256m",), 1, ratio=2),
)
"""The issue's table; cpu-int4 against the best peer, by the medians of the rounds' ratios and shares (paired.py)."""


@dataclass(slots=True, frozen=True)
class Verdict:
    """One goal beside what was measured. `ratio` above 1 is better than the best peer (paired.py)."""

    goal: Goal
    ours: float | None
    peer: str | None
    ratio: float | None
    share: float | None
    met: bool | None
    """None: not measured."""
    stretch: bool | None
    """None: there is no further goal, or it was not measured."""


def ratio_of(metric: Metric, ours: float, other: float) -> float:
    """How many times better `ours` is."""
    return ours / other if metric.higher else other / ours


def is_peer(key: str) -> bool:
    """Whether a contender is none of ours."""
    return not key.startswith("ours")


def fastest(metric: Metric, medians: Mapping[str, Mapping[str, float]]) -> str | None:
    """The key of the peer that has the best median."""
    having = {key: row[metric.key] for key, row in medians.items() if is_peer(key) and metric.key in row}
    if not having:
        return None
    return (max if metric.higher else min)(having, key=lambda key: having[key])


def judge(
    goal: Goal,
    medians: Mapping[str, Mapping[str, float]],
    peers: Mapping[str, str],
    ratios: Mapping[str, float],
    shares: Mapping[str, float],
    cache_mb: float,
) -> Verdict:
    """Compares. `medians`: contender → metric → value; `peers`: metric → the best peer; `ratios`, `shares`: metric → ours against

    that peer, against the limit, medians over the rounds; `cache_mb`: the KV cache of the image prompt's run.
    """
    ours = medians.get(OURS, {}).get(goal.metric)
    ratio, share = ratios.get(goal.metric), shares.get(goal.metric)
    met = _all(_reached(ratio, goal.ratio), _reached(share, goal.share))
    further = [_reached(ratio, goal.stretch_ratio), _reached(share, goal.stretch_share)]
    if goal.within_mb is not None:
        size = medians.get(OURS, {}).get("size_mb")
        further.append(None if ours is None or size is None else ours <= size + cache_mb + goal.within_mb)
    asked = goal.stretch_ratio is not None or goal.stretch_share is not None or goal.within_mb is not None
    return Verdict(goal, ours, peers.get(goal.metric), ratio, share, met, _all(*further) if asked else None)


def _reached(value: float | None, asked: float | None) -> bool | None:
    if asked is None:
        return True
    return None if value is None else value >= asked


def _all(*parts: bool | None) -> bool | None:
    """False as soon as one part is; None where nothing is known against it but something is missing."""
    if any(part is False for part in parts):
        return False
    return None if any(part is None for part in parts) else True


def words(goal: Goal) -> tuple[str, str]:
    """The goal and the stretch in words."""
    first = [f"≥ {goal.ratio:g} × the best peer"] if goal.ratio is not None and goal.ratio != 1 else []
    first += ["the best of all"] if goal.ratio == 1 else []
    first += [f"≥ {100 * goal.share:.0f} % of the limit"] if goal.share is not None else []
    further = [f"{goal.stretch_ratio:g} ×"] if goal.stretch_ratio is not None else []
    further += [f"≥ {100 * goal.stretch_share:.0f} % of the limit"] if goal.stretch_share is not None else []
    further += [f"files + KV + {goal.within_mb:.0f} MB"] if goal.within_mb is not None else []
    return ", ".join(first), ", ".join(further)
