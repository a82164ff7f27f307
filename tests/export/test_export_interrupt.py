"""An interrupt is heeded even where Python would swallow it."""

from __future__ import annotations

import os
import signal
import threading
import weakref

import pytest

from vlm_edge.export.interrupt import interruptible


class Thing:
    pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_in_a_weak_reference_callback_is_not_lost():
    reached = []

    def callback(reference):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the handler runs between two instructions of this callback, which swallows what it raises
            pass

    def work():
        with interruptible():
            thing = Thing()
            kept = weakref.ref(thing, callback)
            del thing
            reached.append(kept)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached  # the block ran to its end: the exception itself was swallowed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_elsewhere_ends_the_block_at_once():
    reached = []

    def work():
        with interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass
            reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_errors_pass():
    with pytest.raises(ValueError, match="mine"), interruptible():
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_and_handlers_are_left_alone():
    seen = []

    def elsewhere():
        with interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
    mine = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, mine)
