"""Figures of one round beside each other: the speed of a virtual machine changes within minutes, so nothing else is compared.

A ratio is taken round by round, of two contenders that were measured in the same one; a share is taken of the limits that were
read directly before and after the process in question. What is reported is the median over the rounds, with least and most.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .goals import METRICS, Metric, ratio_of
from .limits import Limits, best

Row = Mapping[str, Any]
DISK_MB_S = 10.0
"""What a process may read from the disk for each second of its cold start without being one that waited for it: from a disk of
200 MB/s that is 5 % of the time. Some systems take memory back while a slow start is under way."""
RATIO = (
    "the median over the rounds of this contender's figure over the best peer's in the same round, so that above 1 is better; "
    "the best peer is the one with the best median"
)
SHARE = (
    "the median over the rounds of the figure over the limit that was read directly before and after that process, the better "
    "of the two"
)
OLD_SHARE = "without such readings (an older journal) the limit is the best of any round"


@dataclass(slots=True, frozen=True)
class Spread:
    """The median over `rounds` rounds, least and most."""

    median: float
    min: float
    max: float
    rounds: int


def spread(values: Iterable[float]) -> Spread | None:
    """None of nothing."""
    kept = list(values)
    return Spread(statistics.median(kept), min(kept), max(kept), len(kept)) if kept else None


def start_mb(row: Row) -> float:
    """What was read from the disk before the first token, in 10⁶ bytes. Older rows know only what their whole process read."""
    return float(row.get("cold_disk_mb", row.get("disk_mb", 0.0)))


def waited(row: Row) -> bool:
    """Whether a cold start waited for the disk."""
    return start_mb(row) > DISK_MB_S * float(row["cold_s"])


def counted(rows: Sequence[Row], metric: str) -> dict[int, Row]:
    """round → row, of the rounds whose figure counts; none where a round lacks the metric.

    A cold start that waited for the disk does not count, unless all of that contender did.
    """
    if not rows or any(metric not in row for row in rows):
        return {}
    kept = [row for row in rows if not waited(row)] if metric == "cold_s" else list(rows)
    return {row["round"]: row for row in kept or rows}


def figures(rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Spread]]:
    """contender → metric → its figure over the rounds; a metric that a round lacks is lacking."""
    found: dict[str, dict[str, Spread]] = {}
    for key, own in rows.items():
        taken = {m.key: spread(float(row[m.key]) for row in counted(own, m.key).values()) for m in METRICS}
        if own:
            found[key] = {name: figure for name, figure in taken.items() if figure is not None}
    return found


def ratios(metric: Metric, ours: Sequence[Row], peer: Sequence[Row]) -> Spread | None:
    """How many times better than a peer, round by round; None without a round in which both were measured."""
    mine, other = counted(ours, metric.key), counted(peer, metric.key)
    return spread(ratio_of(metric, mine[each][metric.key], other[each][metric.key]) for each in sorted(mine.keys() & other))


def apart_s(metric: Metric, ours: Sequence[Row], peer: Sequence[Row]) -> float:
    """Seconds between the ends of the two processes of a round, at most: pieces of a run may lie far apart."""
    mine, other = counted(ours, metric.key), counted(peer, metric.key)
    both = [(_end(mine[each]), _end(other[each])) for each in mine.keys() & other]
    return max((abs(first - second) for first, second in both), default=0.0)


def _end(row: Row) -> float:
    return datetime.datetime.fromisoformat(row["at"]).timestamp()


def readings(row: Row) -> list[Limits]:
    """The limits as they were read before and after a process; none of an older journal."""
    return [Limits(**each) for each in row.get("limits", ())]


def limit_of(row: Row, otherwise: Limits | None) -> Limits | None:
    """The better of the two readings beside a process; `otherwise` where there are none."""
    return best(readings(row)) or otherwise
