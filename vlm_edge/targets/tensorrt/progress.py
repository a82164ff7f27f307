"""A build's phases, as TensorRT reports them, as one fraction; and the way to stop it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vlm_edge.progress import Progress

from .seam import Library

_POLL_SECONDS = 0.1
Result = TypeVar("Result")


@dataclass(slots=True)
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


@dataclass(slots=True)
class BuildProgress:
    """How far a build is. TensorRT tells it from threads of its own: each phase has a number of steps, within which further

    phases may run (and run again). The fraction only ever rises.
    """

    cancelled: bool = False
    _fraction: float = 0.0
    _phases: dict[str, _Phase] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def began(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins, within a step of `parent` (None: it is the whole build)."""
        with self._lock:
            self._phases[name] = _Phase(parent if parent in self._phases else None, max(1, steps))

    def stepped(self, name: str, step: int) -> bool:
        """Step number `step` of a phase is done. False asks TensorRT to give up."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = max(self._phases[name].done, step + 1)
                self._fraction = max(self._fraction, self._reached())
            return not self.cancelled

    def ended(self, name: str) -> None:
        """A phase is over, whether all its steps were reported or not."""
        with self._lock:
            self._phases.pop(name, None)

    @property
    def fraction(self) -> float:
        """Between 0 and 1."""
        with self._lock:
            return self._fraction

    def _reached(self) -> float:
        roots = [name for name, phase in self._phases.items() if phase.parent is None]
        return min(1.0, self._share(roots[0])) if roots else 0.0

    def _share(self, name: str) -> float:
        phase = self._phases[name]
        inner = max((self._share(other) for other, one in self._phases.items() if one.parent == name), default=0.0)
        return min(1.0, (min(phase.done, phase.steps) + min(inner, 1.0)) / phase.steps)


def monitor(library: Library, watched: BuildProgress) -> Any:
    """An IProgressMonitor that reports to `watched`. Keep a reference as long as the builder's configuration lives."""

    class Monitor(library.module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            library.module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            watched.began(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return watched.stepped(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            watched.ended(phase_name)

    return Monitor()


def run_watched(work: Callable[[], Result], watched: BuildProgress, progress: Progress, step: str) -> Result:
    """Runs `work` in a thread and reports its fraction meanwhile; Ctrl-C asks TensorRT to stop, waits for it, and is raised.

    In a thread, because an exception must not pass through TensorRT's own frames. `step` has to be started with total 1.
    """
    found: list[Result] = []
    raised: list[BaseException] = []

    def target() -> None:
        try:
            found.append(work())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=target, name="engine build", daemon=True)
    thread.start()
    told = 0.0
    try:
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            now = watched.fraction
            if now > told:
                progress.advance(step, now - told)
                told = now
    except BaseException:
        watched.cancelled = True
        thread.join()
        raise
    if raised:
        raise raised[0]
    progress.advance(step, 1.0 - told)
    return found[0]
