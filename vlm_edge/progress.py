"""How library code reports progress without printing: the command line draws it, everyone else may listen."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives one `start` and one `done` (or `failed`) per step, and `advance` in between where a step has a length."""

    def start(self, step: str, total: float | None = None) -> None: ...

    def advance(self, step: str, amount: float = 1.0) -> None: ...

    def done(self, step: str, detail: str = "") -> None: ...

    def failed(self, step: str, reason: str) -> None: ...


class Silent:
    """The default: nobody listens."""

    def start(self, step: str, total: float | None = None) -> None:
        pass

    def advance(self, step: str, amount: float = 1.0) -> None:
        pass

    def done(self, step: str, detail: str = "") -> None:
        pass

    def failed(self, step: str, reason: str) -> None:
        pass
