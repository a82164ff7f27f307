"""Figures of one round beside each other: the speed of a virtual machine changes within minutes, so nothing else is compared.

A ratio is taken round by round, of two contenders that were measured in the same one, and near in time: of what is built anew
the rounds are measured again, hours after the others'. A share is taken of the limits that were read directly before and after
the process in question. What is reported is the median over the rounds, with least and most.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .goals import METRICS, OURS, Metric, fastest, is_peer, ratio_of
from .limits import Limits, best

Row = Mapping[str, Any]
DISK_MB_S = 10.0
"""What a process may read from the disk for each second of its cold start without being one that waited for it: from a disk of
200 MB/s that is 5 % of the time. Some systems take memory back while a slow start is under way."""
APART_S = 1800.0
"""Two processes of a round that ended farther apart than this are not held against each other."""
RATIO = (
    "the median over the rounds of this contender's figure over the best peer's in the same round, so that above 1 is better; "
    f"only processes that ended at most {APART_S / 60:.0f} minutes apart are held against each other; the best peer is the one "
    "over which vlm-edge cpu-int4 has the least such median (without that, the one with the best median)"
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


def far(ours: Sequence[Row], peer: Sequence[Row]) -> set[int]:
    """Rounds whose two processes ended too far apart."""
    ends = {row["round"]: _end(row) for row in peer}
    return {row["round"] for row in ours if abs(_end(row) - ends.get(row["round"], _end(row))) > APART_S}


def _pairs(metric: Metric, ours: Sequence[Row], peer: Sequence[Row]) -> list[tuple[Row, Row]]:
    mine, other = counted(ours, metric.key), counted(peer, metric.key)
    both = [(mine[each], other[each]) for each in sorted(mine.keys() & other)]
    return [(first, second) for first, second in both if abs(_end(first) - _end(second)) <= APART_S]


def ratios(metric: Metric, ours: Sequence[Row], peer: Sequence[Row]) -> Spread | None:
    """How many times better than a peer, round by round; None without a round in which both were measured near in time."""
    return spread(ratio_of(metric, first[metric.key], second[metric.key]) for first, second in _pairs(metric, ours, peer))


def hardest(metric: Metric, rows: Mapping[str, Sequence[Row]], medians: Mapping[str, Mapping[str, float]]) -> str | None:
    """The peer over which ours has the least median of ratios, so that the choice does not flatter; None: no peer has the metric.

    `medians`: contender → metric → value. The peer with the best median where that one has no round with ours (or ours is not
    measured at all): then there is rather no ratio than one to a slower peer.
    """
    best = fastest(metric, medians)
    having = [key for key, own in medians.items() if is_peer(key) and metric.key in own]
    found = {key: ratios(metric, rows.get(OURS, ()), rows[key]) for key in having}
    known = {key: ratio.median for key, ratio in found.items() if ratio is not None}
    return min(known, key=lambda key: known[key]) if best in known else best


def apart_s(metric: Metric, ours: Sequence[Row], peer: Sequence[Row]) -> float:
    """Seconds between the ends of two processes that are held against each other, at most."""
    return max((abs(_end(first) - _end(second)) for first, second in _pairs(metric, ours, peer)), default=0.0)


def _end(row: Row) -> float:
    return datetime.datetime.fromisoformat(row["at"]).timestamp()


def readings(row: Row) -> list[Limits]:
    """The limits as they were read before and after a process; none of an older journal."""
    return [Limits(**each) for each in row.get("limits", ())]


def limit_of(row: Row, otherwise: Limits | None) -> Limits | None:
    """The better of the two readings beside a process; `otherwise` where there are none."""
    return best(readings(row)) or otherwise
