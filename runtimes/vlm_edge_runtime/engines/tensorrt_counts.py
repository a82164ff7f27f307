"""What a compiled decoder ran, and how."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class StepCounts:
    """What ran: rows by themselves, steps queued one by one, steps launched as captured graphs, tokens chosen on the host."""

    rows: int = 0
    queued: int = 0
    captured: int = 0
    host_sampled: int = 0
    not_captured_because: str = ""
