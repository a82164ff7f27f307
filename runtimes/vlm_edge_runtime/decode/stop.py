"""Stop strings: text is withheld as long as it may turn out to be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Cuts a stream of text before the first stop string that is completed.

    Of several, the one that *ends* first wins (of those ending together, the longest), so the cut does not depend on how
    the text was sliced into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was met."""

    def push(self, text: str) -> str:
        """Takes the next text and returns what may be shown. Nothing more comes once `matched` is set."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = self._held.find(stop)
            if start >= 0:
                found = (start + len(stop), start, stop)
                best = found if best is None else min(best, found)
        if best is not None:
            _, start, self.matched = best
            shown, self._held = self._held[:start], ""
            return shown
        keep = self._possible_start()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """The end of the text came: what was withheld was no stop string after all."""
        shown, self._held = self._held, ""
        return shown

    def _possible_start(self) -> int:
        """Length of the longest end of the withheld text that a stop string begins with."""
        longest = min(len(self._held), max(len(stop) for stop in self._stops) - 1)
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
