"""The life of a decoder state: cancelling, closing, other threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from toy_decoder import Toy
from toy_pair import PROMPTS, Pair

from vlm_edge_runtime.engines.base import SamplingParams
from vlm_edge_runtime.errors import DeviceError


@pytest.fixture(scope="module", name="one")
def _one() -> Pair:
    return Pair(Toy())


class Long:
    """A decode call of many steps, running in a thread."""

    steps = 3000

    def __init__(self) -> None:
        self.pair = Pair(Toy(hidden=256, vocab=4000, positions=4096))
        self.state = self.pair.state(capacity=4000)
        self.pair.fill(self.state, 0, [1, 2])
        self.pair.start(self.state, 0, [], SamplingParams())
        self.rows: list[tuple] = []
        self._thread = threading.Thread(target=lambda: self.rows.extend(self.state.decode(self.steps)))
        self._thread.start()

    def meet(self) -> None:
        """Returns once the call is seen running: a second thread is refused then."""
        while self._thread.is_alive():
            try:
                _ = self.state.lengths
            except DeviceError as error:
                assert "in use by another thread" in str(error)
                return
        pytest.fail("the call ended before it was seen running")

    def tokens(self) -> list[int]:
        self._thread.join()
        return self.rows[0][0]


def test_cancel_from_another_thread() -> None:
    long = Long()
    long.meet()
    long.state.cancel()
    assert len(long.tokens()) < long.steps
    assert long.state.decode(100)[0][0] == []  # stays cancelled …
    long.pair.start(long.state, 0, [], SamplingParams())
    assert len(long.state.decode(5)[0][0]) == 5  # … until the next start


def test_close_from_another_thread_waits_for_the_running_call() -> None:
    long = Long()
    long.meet()
    long.state.close()
    assert len(long.tokens()) < long.steps
    with pytest.raises(DeviceError, match="closed"):
        long.state.decode(1)


def test_use_after_close_is_an_error(one) -> None:
    state = one.state()
    one.fill(state, 0, [1])
    state.close()
    state.close()
    state.cancel()
    calls: list[Callable[[], object]] = [
        lambda: state.lengths,
        lambda: state.logits(0),
        lambda: state.decode(1),
        lambda: state.push(0, 1),
        lambda: state.truncate(0, 0),
        lambda: state.take_times(),
        lambda: state.kv_bytes,
        lambda: one.start(state, 0, [], SamplingParams()),
    ]
    for call in calls:
        with pytest.raises(DeviceError, match="closed"):
            call()
    other = one.state()
    for source, target in ((state, other), (other, state)):
        with pytest.raises(DeviceError, match="closed"):
            target.copy_prefix(0, source, 0, 0)


def test_state_keeps_closed_sessions_alive() -> None:
    pair = Pair(Toy())
    state = pair.state()
    pair.fill(state, 0, PROMPTS[0])
    expected = pair.expected(PROMPTS[0], 5, SamplingParams())
    pair.start(state, 0, PROMPTS[0], SamplingParams())
    pair.decoder.close()
    pair.embed_tokens.close()
    assert state.decode(5)[0][0] == expected
    with pytest.raises(DeviceError, match="closed"):
        pair.state()
