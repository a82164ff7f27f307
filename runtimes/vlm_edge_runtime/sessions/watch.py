"""Answers about the frames of a camera: the next frame is encoded while the current answer is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from vlm_edge_runtime.decode.result import Generation
from vlm_edge_runtime.decode.stats import Stats

from .prefetched import Prefetched


@dataclass(slots=True, frozen=True)
class Sight:
    """A frame and the answer about it. `number`: which frame of the source it was, from 0. `stats`: of this answer."""

    number: int
    frame: Any
    answer: Generation
    stats: Stats


class _Frames:
    """A source that is read by a thread of its own; of frames that nobody took in time only the newest is kept.

    With `drop` off the next frame waits until it is taken, and the source with it.
    """

    def __init__(self, frames: Iterable[Any], drop: bool) -> None:
        self._source = frames
        self._drop = drop
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, Any]] = []
        self._error: BaseException | None = None
        self._over = False
        self.dropped = 0
        # A daemon: a camera that gives no more frames must not keep the process alive.
        threading.Thread(target=self._read, name="vlm-edge-frames", daemon=True).start()

    def take(self) -> tuple[int, Any] | None:
        """The frame that waits, or the next one; None after the last, and after `close`. Raises what the source raised."""
        with self._changed:
            while not (self._waiting or self._over) and threading.main_thread().is_alive():
                self._changed.wait(0.5)
            if self._waiting:
                self._changed.notify_all()
                return self._waiting.pop()
            if self._error is not None:
                raise self._error
            return None

    def close(self) -> None:
        """Ends it: what waits is forgotten, and the source is read no further than the frame that is due."""
        with self._changed:
            self._over, self._error = True, None
            self._waiting.clear()
            self._changed.notify_all()

    def _read(self) -> None:
        error = None
        try:
            for number, frame in enumerate(self._source):
                with self._changed:
                    while not self._drop and self._waiting and not self._over:
                        self._changed.wait()
                    if self._over:
                        return
                    self.dropped += len(self._waiting)
                    self._waiting = [(number, frame)]
                    self._changed.notify_all()
        except BaseException as raised:  # it is the consumer's to handle
            error = raised
        with self._changed:
            self._error = None if self._over else error
            self._over = True
            self._changed.notify_all()


Start = Callable[[Callable[[], Any], Callable[[], None]], Prefetched]
"""Begins to encode what its first argument gives; the second ends the wait for that."""


class Watch(Iterator[Sight]):
    """Answers in the order of their frames; made by `VisionLanguageModel.watch`. Close it, or leave its `with` block.

    `dropped`: frames so far that were not looked at, since a newer one was there.
    """

    def __init__(
        self,
        frames: Iterable[Any],
        drop: bool,
        prefetch: Start,
        generate: Callable[[Prefetched], tuple[Generation, Stats]],
    ) -> None:
        self._frames = _Frames(frames, drop)
        self._sights = _sights(self._frames, prefetch, generate)

    @property
    def dropped(self) -> int:
        """Frames that were not looked at."""
        return self._frames.dropped

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Sight:
        return next(self._sights)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends it; what is encoded in the background is left. Not to be called while another thread asks for an answer."""
        self._frames.close()
        self._sights.close()


class _Ahead:
    """The next frame, taken and encoded in the background."""

    def __init__(self, frames: _Frames, prefetch: Start) -> None:
        self._frames = frames
        self.taken: tuple[int, Any] | None = None
        self.inputs = prefetch(self._take, frames.close)

    def _take(self) -> Any:
        self.taken = self._frames.take()
        return [] if self.taken is None else [self.taken[1]]


def _sights(
    frames: _Frames,
    prefetch: Start,
    generate: Callable[[Prefetched], tuple[Generation, Stats]],
) -> Generator[Sight, None, None]:
    ahead = _Ahead(frames, prefetch)
    try:
        while ahead.inputs.media() and ahead.taken is not None:
            now, ahead = ahead, _Ahead(frames, prefetch)
            assert now.taken is not None
            answer, stats = generate(now.inputs)
            yield Sight(*now.taken, answer, stats)
    finally:
        frames.close()
        ahead.inputs.cancel()
