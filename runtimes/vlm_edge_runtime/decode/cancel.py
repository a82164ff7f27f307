"""Stopping a generation from another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol


class CancelLike(Protocol):
    """`CancelToken`, or a `threading.Event` (which is looked at between steps)."""

    def is_set(self) -> bool: ...


class CancelToken:
    """Cancels every generation it was passed to (`generate(..., cancel=token)`), at once and from any thread.

    Unlike a plain `threading.Event` it also reaches into a decode loop that is running. It stays cancelled: use a new one for
    the next call.
    """

    def __init__(self) -> None:
        self._set = False
        # Re-entrant: the garbage collector may close a generation, which detaches, while this thread holds the lock.
        self._lock = threading.RLock()
        self._hooks: dict[int, Callable[[], None]] = {}
        self._next = 0

    def cancel(self) -> None:
        """Cancels. Calling it twice does no harm."""
        # The hooks run under the lock: once `detach` has returned, its hook runs no more.
        with self._lock:
            self._set = True
            for hook in list(self._hooks.values()):
                hook()

    def is_set(self) -> bool:
        """Whether `cancel` was called."""
        return self._set

    def attach(self, hook: Callable[[], None]) -> int:
        """Calls `hook` on `cancel` (at once when it was called already); returns a number for `detach`."""
        with self._lock:
            self._next += 1
            number = self._next
            self._hooks[number] = hook
            cancelled = self._set
        if cancelled:
            hook()
        return number

    def detach(self, number: int) -> None:
        """Forgets a hook. Unknown numbers are ignored."""
        with self._lock:
            self._hooks.pop(number, None)
