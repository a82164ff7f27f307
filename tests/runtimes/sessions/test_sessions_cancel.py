"""Ending a generation from outside: other threads, tokens, events, Ctrl-C. The session is as good as before afterwards."""

from __future__ import annotations

import _thread
import threading

import pytest
from session_pictures import noise

from vlm_edge_runtime import CancelToken, GenerationCancelled

ASK = "what is in the picture?"
LONG = {"max_new_tokens": 190, "ignore_eos": True}


def _usable(vlm) -> None:
    vlm.generate(ASK, images=noise(1), max_new_tokens=3, ignore_eos=True)
    reused = vlm.generate(ASK, images=noise(1), max_new_tokens=3, ignore_eos=True)
    vlm.clear_caches()
    assert vlm.generate(ASK, images=noise(1), max_new_tokens=3, ignore_eos=True).tokens == reused.tokens
    assert not vlm._active


class _InTheMiddle:
    """Passed as `cancel`, it is asked between steps: the fifth time it acts, from another thread, without being set itself."""

    def __init__(self, action) -> None:
        self._action = action
        self._asked = 0

    def is_set(self) -> bool:
        self._asked += 1
        if self._asked == 5:
            thread = threading.Thread(target=self._action)
            thread.start()
            thread.join()
        return False


@pytest.mark.parametrize("build", ["cpu-fp32", "portable"])
def test_cancel_ends_generate(build, session) -> None:
    vlm = session("llava-llama", build)
    whole = vlm.generate(ASK, images=noise(1), **LONG)
    vlm.clear_caches()
    with pytest.raises(GenerationCancelled) as cancelled:
        vlm.generate(ASK, images=noise(1), cancel=_InTheMiddle(vlm.cancel), **LONG)
    assert whole.text.startswith(cancelled.value.partial_text)
    assert cancelled.value.partial_text
    assert vlm.stats.new_tokens < 10
    _usable(vlm)


def test_cancel_ends_a_stream(session) -> None:
    vlm = session("llava-llama")
    stream = vlm.stream(ASK, images=noise(1), **LONG)
    text = next(stream)
    thread = threading.Thread(target=vlm.cancel)
    thread.start()
    thread.join()
    text += "".join(stream)
    assert stream.finish_reason == "cancelled"
    assert stream.result.text == text
    assert stream.stats.new_tokens < 10
    _usable(vlm)


def test_one_stream_can_be_ended_alone(session) -> None:
    vlm = session("llava-llama")
    first, second = (vlm.stream(ASK, images=noise(seed), max_new_tokens=12, ignore_eos=True) for seed in (1, 2))
    next(first)
    next(second)
    first.cancel()
    list(first)
    list(second)
    assert (first.finish_reason, second.finish_reason) == ("cancelled", "length")


def test_cancelling_what_has_ended_reaches_nobody_else(session) -> None:
    vlm = session("llava-llama")
    token = CancelToken()
    ended = vlm.stream(ASK, images=noise(1), max_new_tokens=3, ignore_eos=True, cancel=token)
    text = "".join(ended)
    assert ended.finish_reason == "length"
    going_on = vlm.stream(ASK, images=noise(1), max_new_tokens=12, ignore_eos=True)  # takes over its KV cache
    start = next(going_on)
    ended.cancel()
    token.cancel()
    assert (start + "".join(going_on)).startswith(text)
    assert going_on.finish_reason == "length"
    assert ended.finish_reason == "length"


@pytest.mark.parametrize("kind", [CancelToken, threading.Event])
def test_a_token_or_event_cancels_its_own_call(kind, session) -> None:
    vlm = session("llava-llama")
    token = kind()
    set_it = token.cancel if isinstance(token, CancelToken) else token.set
    stream = vlm.stream(ASK, images=noise(1), cancel=token, **LONG)
    next(stream)
    set_it()
    before = stream.stats.new_tokens
    list(stream)
    assert stream.finish_reason == "cancelled"
    assert stream.stats.new_tokens <= before + 1
    with pytest.raises(GenerationCancelled) as cancelled:
        vlm.generate(ASK, images=noise(1), cancel=token)  # it stays set
    assert cancelled.value.partial_text == ""
    _usable(vlm)


def test_a_call_that_waits_for_its_turn_is_cancelled_too(session) -> None:
    vlm = session("llava-llama")
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            vlm.generate(ASK, images=noise(1))
        except GenerationCancelled as error:
            errors.append(error)

    with vlm._turn:
        thread = threading.Thread(target=wait)
        thread.start()
        while not vlm._active:
            pass
        vlm.cancel()
    thread.join()
    assert len(errors) == 1
    _usable(vlm)


def test_threads_take_turns(session) -> None:
    vlm = session("llava-llama")
    expected = [vlm.generate(ASK, images=noise(seed), max_new_tokens=8, ignore_eos=True).tokens for seed in range(4)]
    vlm.clear_caches()
    found: dict[int, list[int]] = {}

    def ask(seed: int) -> None:
        found[seed] = vlm.generate(ASK, images=noise(seed), max_new_tokens=8, ignore_eos=True).tokens

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(4)] == expected


def test_ctrl_c_leaves_the_session_usable(session) -> None:
    vlm = session("llava-llama")
    with pytest.raises(KeyboardInterrupt):
        vlm.generate(ASK, images=noise(1), cancel=_InTheMiddle(_thread.interrupt_main), **LONG)
    assert vlm.stats.new_tokens < 10
    _usable(vlm)
    with pytest.raises(KeyboardInterrupt):
        for _ in vlm.stream(ASK, images=noise(2), **LONG):
            raise KeyboardInterrupt
    _usable(vlm)
