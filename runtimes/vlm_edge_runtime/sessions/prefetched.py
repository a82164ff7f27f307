"""Inputs that are being encoded in the background: what the caller holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vlm_edge_runtime.errors import GenerationCancelled, PromptError

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    from .media import Medium


class _Stopped(Exception):
    """Leaves the work of inputs that were cancelled."""


class Prefetched:
    """Inputs that are opened, preprocessed and encoded in the background; made by `VisionLanguageModel.prefetch`.

    It is passed wherever such inputs are (`images=ahead`, in a list, in a message's part), more than once if need be, and holds
    its features until it is dropped. Using it waits until it is ready, and raises there what went wrong in the background.
    """

    def __init__(
        self, executor: Executor, work: Callable[[Callable[[], None]], list[Medium]], wake: Callable[[], None] = lambda: None
    ) -> None:
        """`work` opens and encodes the inputs; it calls its argument between runs of graphs, which raises to stop."""
        self._work = work
        self._wake = wake
        self._stop = threading.Event()
        self._future: Future[list[Medium]] = executor.submit(self._run)

    @property
    def done(self) -> bool:
        """Whether it can be used without waiting; also after an error, or when it was cancelled."""
        return self._future.done()

    def cancel(self) -> None:
        """Ends the work after the graph that runs now. What was ready stays so; else using it raises GenerationCancelled."""
        self._stop.set()
        self._future.cancel()
        self._wake()

    def media(self) -> list[Medium]:
        """The encoded inputs, when they are ready. Raises as `generate`, and GenerationCancelled."""
        from concurrent.futures import CancelledError

        try:
            return self._future.result()
        except (CancelledError, _Stopped):
            raise GenerationCancelled("the inputs were cancelled before they were encoded.") from None

    def only(self) -> Medium:
        """The one input there is. Raises PromptError for several."""
        media = self.media()
        if len(media) != 1:
            raise PromptError(f"a part of a message holds one input; this one was prefetched with {len(media)}.")
        return media[0]

    def _run(self) -> list[Medium]:
        self._between()
        return self._work(self._between)

    def _between(self) -> None:
        if self._stop.is_set():
            raise _Stopped


def unwrapped(values: Sequence[Any]) -> list[Any]:
    """Inputs, with those that were prefetched in place of what holds them."""
    found: list[Any] = []
    for value in values:
        found += value.media() if isinstance(value, Prefetched) else [value]
    return found
