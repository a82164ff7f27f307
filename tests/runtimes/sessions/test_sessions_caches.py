"""The caches by themselves: byte budgets, prefixes by content, which KV cache is taken and which is copied."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_edge_runtime.bundle.manifest import KVLayout
from vlm_edge_runtime.errors import DeviceError
from vlm_edge_runtime.sessions.kv_plan import BUCKET, KVPlan
from vlm_edge_runtime.sessions.lru import ByteLRU
from vlm_edge_runtime.sessions.prefix_cache import MIN_REUSE, Prefix, PrefixCache, common_prefix, reusable
from vlm_edge_runtime.sessions.token_inputs import chunk_end


def ids(*numbers: int) -> np.ndarray:
    return np.asarray(numbers, dtype=np.int64)


def test_lru_forgets_the_least_recently_used() -> None:
    cache: ByteLRU[str, int] = ByteLRU(10)
    cache.put("a", 1, 4)
    cache.put("b", 2, 4)
    assert cache.get("a") == 1
    cache.put("c", 3, 4)
    assert "b" not in cache
    assert (cache.get("a"), cache.get("c"), cache.bytes) == (1, 3, 8)
    cache.put("huge", 4, 11)
    assert "huge" not in cache
    assert cache.bytes == 8
    cache.put("a", 5, 2)
    assert (cache.get("a"), cache.bytes) == (5, 6)
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), max_size=40))
def test_lru_stays_within_its_budget(puts) -> None:
    cache: ByteLRU[int, int] = ByteLRU(20)
    sizes = {}
    for key, size in puts:
        cache.put(key, key, size)
        sizes[key] = size
        assert cache.bytes <= 20
        assert cache.bytes == sum(sizes[k] for k in sizes if k in cache)


def test_an_empty_budget_keeps_nothing() -> None:
    cache: ByteLRU[str, int] = ByteLRU(0)
    cache.put("a", 1, 1)
    assert cache.get("a") is None


def test_common_prefix() -> None:
    assert common_prefix(ids(1, 2, 3), ids(1, 2, 4)) == 2
    assert common_prefix(ids(1, 2), ids(1, 2, 4)) == 2
    assert common_prefix(ids(), ids(1)) == 0
    assert common_prefix(ids(1, -7, -7), ids(1, -8, -8)) == 1  # the same token, another image


def test_one_token_is_always_left_to_run() -> None:
    prompt = np.arange(20)
    assert reusable(prompt, prompt) == 19
    assert reusable(prompt[:MIN_REUSE], prompt) == MIN_REUSE
    assert reusable(prompt[: MIN_REUSE - 1], prompt) == 0


def test_kv_plan() -> None:
    layout = KVLayout(layers=2, kv_heads=3, head_dim=4, dtype="float16")
    plan = KVPlan.make(layout, 1000, budget=2 * 1000 * 96)
    assert plan.entry_bytes == 2 * 2 * 3 * 4 * 2 == 96
    assert plan.capacity(2, 10) == 1000
    assert plan.capacity(3, 10) == BUCKET
    assert plan.capacity(3, BUCKET + 1) == 2 * BUCKET
    assert plan.capacity(3, 1000) == 1000


def test_a_block_is_taken_over_whole_or_not_at_all() -> None:
    prompt = np.arange(30)
    assert reusable(prompt, prompt, [(20, 25)]) == 29
    assert reusable(prompt[:23], prompt, [(20, 25)]) == 20
    assert reusable(prompt[:25], prompt, [(20, 25)]) == 25
    assert reusable(prompt, prompt, [(10, 20), (20, 30)]) == 20  # its last token is needed, so all of its block
    assert reusable(prompt, prompt, [(0, 30)]) == 0
    assert reusable(prompt, prompt, [(MIN_REUSE - 1, 30)]) == 0


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(1, 9))
def test_no_piece_of_a_prompt_cuts_a_block(sizes, chunk) -> None:
    edges = np.cumsum([0, *sizes]).tolist()
    blocks = list(zip(edges[::2], edges[1::2], strict=False))
    length, start = edges[-1], 0
    while start < length:
        end = chunk_end(start, chunk, length, blocks)
        assert start < end <= length
        assert all(not first < end < last for first, last in blocks)
        assert end - start <= max(chunk, 6)
        start = end


class Cache:
    """A KV cache that remembers what was written instead of computing."""

    made: ClassVar[list[Cache]] = []

    def __init__(self, batch: int, capacity: int) -> None:
        self.batch, self.capacity = batch, capacity
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.closed = False
        self.made.append(self)

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]

    def truncate(self, row: int, length: int) -> None:
        assert length <= len(self.rows[row])
        del self.rows[row][length:]

    def copy_prefix(self, row: int, source: Cache, source_row: int, length: int) -> None:
        assert length <= len(source.rows[source_row])
        self.rows[row] = list(source.rows[source_row][:length])

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def kept():
    Cache.made = []
    return PrefixCache(Cache, entry_bytes=1, budget=100)


def use(kept: PrefixCache, *prompts: np.ndarray, answer=(), capacity: int = 64) -> tuple[Cache, list[int]]:
    """A call: takes a cache, checks that it holds what it claims, fills it, gives it back. Returns what was reused."""
    slots = kept.acquire([Prefix(prompt) for prompt in prompts], capacity)
    reused = [len(contents) for contents in slots.contents]
    for row, prompt in enumerate(prompts):
        assert slots.state.rows[row] == list(prompt[: reused[row]])
        slots.state.rows[row] += list(prompt[reused[row] :])
        slots.state.rows[row] += list(answer)
        slots.contents[row] = np.concatenate([prompt, ids(*answer)])
    kept.release(slots)
    return slots.state, reused


def test_the_next_turn_takes_the_kept_cache(kept) -> None:
    first, reused = use(kept, np.arange(20), answer=(100, 101))
    assert reused == [0]
    second, reused = use(kept, np.concatenate([np.arange(20), ids(100, 101, 7, 8)]))
    assert second is first
    assert reused == [22]
    assert len(Cache.made) == 1


def test_a_short_common_prefix_leaves_the_long_conversation_alone(kept) -> None:
    long, _ = use(kept, np.arange(40))
    other, reused = use(kept, np.concatenate([np.arange(10), ids(77, 78)]))
    assert other is not long
    assert reused == [10]
    again, reused = use(kept, np.arange(42))
    assert again is long
    assert reused == [40]


def test_unrelated_prompts_share_nothing(kept) -> None:
    first, _ = use(kept, np.arange(20))
    second, reused = use(kept, np.arange(100, 120))
    assert second is not first
    assert reused == [0]


def test_the_budget_closes_what_was_not_used_for_longest(kept) -> None:
    first, _ = use(kept, np.arange(40))
    second, _ = use(kept, np.arange(100, 140))
    third, _ = use(kept, np.arange(200, 240))
    assert first.closed
    assert not third.closed
    assert kept.bytes <= 100
    huge, _ = use(kept, np.arange(300, 500), capacity=256)
    assert not huge.closed  # the newest stays whatever its size
    assert second.closed
    assert third.closed
    kept.clear()
    assert huge.closed


def test_rows_of_a_batch_copy_from_any_row(kept) -> None:
    use(kept, np.arange(20), np.arange(100, 120))
    batch, reused = use(kept, np.arange(100, 125), np.arange(25), np.arange(100, 122))
    assert batch.batch == 3
    assert reused == [20, 20, 20]
    same, reused = use(kept, np.arange(100, 126), np.arange(26), np.arange(100, 123))
    assert same is batch
    assert reused == [25, 25, 22]


def test_a_cache_too_small_is_copied_from(kept) -> None:
    small, _ = use(kept, np.arange(20), capacity=32)
    large, reused = use(kept, np.arange(40), capacity=64)
    assert large is not small
    assert reused == [20]


def test_entries_nobody_vouches_for_are_forgotten(kept) -> None:
    slots = kept.acquire([Prefix(np.arange(20))], 64)
    slots.state.rows[0] = list(range(15))  # interrupted in the middle of the prompt
    slots.contents[0] = np.arange(20)[:10]
    kept.release(slots)
    again, reused = use(kept, np.arange(20))
    assert reused == [10]
    assert again is slots.state


def test_rows_are_bound_while_they_are_empty(kept) -> None:
    """Before anything is copied into them; a row that keeps entries keeps what it is bound to."""
    bound: list[tuple[int, int]] = []

    def prefix(contents: np.ndarray, number: int) -> Prefix:
        def bind(state: Cache, row: int) -> None:
            assert state.rows[row] == []
            bound.append((number, row))

        return Prefix(contents, (), bind, 7)

    slots = kept.acquire([prefix(np.arange(20), 1), prefix(np.arange(50, 70), 2)], 64)
    assert bound == [(1, 0), (2, 1)]
    for row, first in enumerate((0, 50)):
        slots.state.rows[row] = list(range(first, first + 20))
        slots.contents[row] = np.arange(first, first + 20)
    kept.release(slots)
    assert kept.bytes == 40 + 14
    again = kept.acquire([prefix(np.arange(25), 3), prefix(np.arange(80, 99), 4)], 64)
    assert again.state is slots.state
    assert bound[2:] == [(4, 1)]
    other = kept.acquire([prefix(np.arange(25), 5)], 64)
    assert bound[3:] == [(5, 0)]
    assert len(other.contents[0]) == 0

    def refuse(state: Cache, row: int) -> None:
        raise ValueError("misshapen")

    with pytest.raises(ValueError, match="misshapen"):
        kept.acquire([Prefix(np.arange(25), (), refuse)], 64)
    assert Cache.made[-1].closed


def test_broken_and_late_ones_are_closed(kept) -> None:
    slots = kept.acquire([Prefix(np.arange(20))], 64)
    slots.broken = True
    kept.release(slots)
    assert slots.state.closed
    late = kept.acquire([Prefix(np.arange(20))], 64)
    kept.close()
    kept.release(late)
    assert late.state.closed


def test_keeping_can_be_off() -> None:
    off = PrefixCache(Cache, entry_bytes=1, budget=100, enabled=False)
    state, _ = use(off, np.arange(20))
    assert state.closed


def test_a_release_inside_a_critical_section_waits_in_line(kept) -> None:
    """The garbage collector may close a generation while this very thread holds the lock."""
    slots = kept.acquire([Prefix(np.arange(20))], 64)
    slots.state.rows[0] = list(range(20))
    slots.contents[0] = np.arange(20)
    with kept._lock:
        kept.release(slots)
    assert kept.bytes == 20


def test_kept_caches_make_room_when_memory_is_short() -> None:
    room = 2

    def allocate(batch: int, capacity: int) -> Cache:
        if sum(not cache.closed for cache in Cache.made) >= room:
            raise DeviceError("no memory")
        return Cache(batch, capacity)

    Cache.made = []
    kept = PrefixCache(allocate, entry_bytes=1, budget=1000)
    first, _ = use(kept, np.arange(40))
    second, _ = use(kept, np.arange(100, 140))
    third, reused = use(kept, np.concatenate([np.arange(10), ids(77)]))
    assert (first.closed, second.closed, third.closed, reused) == (False, True, False, [10])
    room = 0
    with pytest.raises(DeviceError):
        use(kept, np.arange(500, 520))
