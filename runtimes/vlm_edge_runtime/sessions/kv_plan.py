"""How large a KV cache is made, before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_edge_runtime.bundle.manifest import Build, KVLayout
from vlm_edge_runtime.machine import available_memory

BUCKET = 256
"""Capacities below the full context are multiples of this, so that caches of similar prompts are interchangeable."""

# Of the memory that is free when the session is loaded, this share may be promised to one call's cache.
_SHARE = 0.5


def cache_sizes(build: Build | None) -> list[int]:
    """The cache sizes that a build's decoder was compiled for, ascending; none where any size will do."""
    engines = build.engines if build is not None else []
    return sorted({one.capacity for one in engines if one.role == "decoder" and one.capacity is not None})


@dataclass(slots=True, frozen=True)
class KVPlan:
    """The memory plan of the KV caches.

    A call's cache is allocated once, for the whole `context_length`: its pages are taken only when they are written, so a
    short prompt costs little, and a conversation never has to move. Only where `batch × context_length` entries would pass
    `budget` bytes is it made for what the call needs (prompt and answer), rounded up to BUCKET; a later, longer turn then
    gets a new cache, into which the kept prefix is copied.

    `sizes`: where engines are compiled for caches of certain sizes, which take all their memory at once, a call gets the
    smallest that holds what it needs.
    """

    context_length: int
    entry_bytes: int
    budget: int
    sizes: tuple[int, ...] = ()

    @classmethod
    def make(cls, layout: KVLayout, context_length: int, budget: int | None = None, sizes: Sequence[int] = ()) -> KVPlan:
        """The plan for a decoder's layout; without `budget`, half of the memory that is available now."""
        free = int(available_memory() * _SHARE) if budget is None else budget
        return cls(context_length=context_length, entry_bytes=layout.entry_bytes, budget=free, sizes=tuple(sorted(sizes)))

    def bytes(self, batch: int, capacity: int) -> int:
        """Bytes of a cache when it is full."""
        return batch * capacity * self.entry_bytes

    def capacity(self, batch: int, needed: int) -> int:
        """Entries per row for `batch` rows of which the longest needs `needed`."""
        if self.sizes:
            return min(self.context_length, next((size for size in self.sizes if size >= needed), self.sizes[-1]))
        if self.bytes(batch, self.context_length) <= self.budget:
            return self.context_length
        return min(self.context_length, -(-needed // BUCKET) * BUCKET)
