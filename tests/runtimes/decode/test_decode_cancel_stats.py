"""Cancel tokens, and the arithmetic of statistics."""

from __future__ import annotations

import threading

import pytest

from vlm_edge_runtime.decode.cancel import CancelToken
from vlm_edge_runtime.decode.stats import Counters, Stats


def test_hooks_run_once_cancelled() -> None:
    token = CancelToken()
    called: list[str] = []
    token.attach(lambda: called.append("a"))
    gone = token.attach(lambda: called.append("b"))
    token.detach(gone)
    assert not token.is_set()
    thread = threading.Thread(target=token.cancel)
    thread.start()
    thread.join()
    assert token.is_set()
    assert called == ["a"]
    token.attach(lambda: called.append("late"))
    assert called == ["a", "late"]


def test_a_hook_may_detach() -> None:
    token = CancelToken()
    numbers: list[int] = []
    numbers.append(token.attach(lambda: token.detach(numbers[0])))
    token.cancel()
    assert token.is_set()


def test_derived_figures() -> None:
    stats = Stats(rows=2, prefill_tokens=30, prefill_s=0.5, new_tokens=10, steps=5, decode_s=2.0)
    assert stats.prefill_tps == 60
    assert stats.tpot_s == 0.5
    assert stats.decode_tps == 4
    assert stats.to_dict()["decode_tps"] == 4
    first_only = Stats(rows=1, new_tokens=1, steps=1)
    assert (first_only.tpot_s, first_only.decode_tps, first_only.prefill_tps) == (0, 0, 0)


def test_counters_add_up() -> None:
    counters = Counters()
    counters.add(Stats(new_tokens=3, prefill_s=0.5, image_cache_hits=1))
    counters.add(Stats(new_tokens=4, prefill_s=0.25))
    assert counters.calls == 2
    assert counters.to_dict()["new_tokens"] == 7
    assert counters.prefill_s == pytest.approx(0.75)
    assert counters.image_cache_hits == 1
