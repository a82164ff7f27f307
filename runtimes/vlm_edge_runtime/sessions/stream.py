"""An answer that comes piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Self

from vlm_edge_runtime.decode.result import FinishReason, Generation
from vlm_edge_runtime.decode.stats import Stats

from .run import Run


class TextStream(Iterator[str]):
    """The pieces of one answer, in order; made by `stream()`.

    Nothing runs before the first piece is asked for. Closing it, leaving its `with` block, or just dropping it cancels the
    rest and gives back what it held. After `cancel()` it ends, with `finish_reason` "cancelled".
    """

    def __init__(self, run: Run, turn: threading.Lock, begin: Callable[[Run], None], end: Callable[[Run], None]) -> None:
        self._run = run
        # The generator knows the run but not this object: dropping this object drops it, which closes the run.
        self._pieces = _pieces(run, turn, begin, end)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def cancel(self) -> None:
        """Ends the answer after the current step. Safe from any thread."""
        self._run.cancel.cancel()

    def close(self) -> None:
        """Ends the answer here and gives back its KV cache. Not to be called while another thread asks for a piece."""
        self._pieces.close()

    @property
    def stats(self) -> Stats:
        """Figures of this answer so far."""
        return self._run.stats

    @property
    def result(self) -> Generation:
        """The answer so far: text, tokens, log probabilities."""
        return self._run.results()[0]

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it goes on."""
        return self.result.finish_reason if self._run.done or self._run.closed else None


def _pieces(
    run: Run, turn: threading.Lock, begin: Callable[[Run], None], end: Callable[[Run], None]
) -> Generator[str, None, None]:
    """One step at a time under the session's lock, which is free while the caller looks at a piece."""
    try:
        with turn:
            begin(run)
        while not run.done:
            with turn:
                (piece,) = run.advance(1)
            if piece:
                yield piece
    finally:
        run.close()
        end(run)
