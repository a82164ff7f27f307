"""Ctrl-C that cannot get lost while a model is traced.

Python raises KeyboardInterrupt wherever the main thread happens to be. Tracing spends much of its time in callbacks of weak
references, where an exception is printed and forgotten: the interrupt would be swallowed and the export would go on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Iterator[None]:
    """Raises KeyboardInterrupt at once where that works, and at the latest when the block ends.

    Does nothing outside the main thread, or where the caller handles SIGINT in a way of its own.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interrupted = False

    def heed(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, heed)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupted:
        raise KeyboardInterrupt
