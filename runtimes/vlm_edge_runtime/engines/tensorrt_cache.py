"""The KV cache of one decoder state on the device: allocated once, rows contiguous, in place or in two sets that take turns."""

from __future__ import annotations

from collections.abc import Sequence

from .cuda_device import ALIGNMENT, Device, Memory
from .tensorrt_signature import CacheSpec, Signature


class DeviceCache:
    """`past_key_values.*` [batch, heads, bucket, entry] for every cache tensor.

    Where the engine does not update in place, a step reads the set `side` and writes the other one, which then is `side`.
    """

    def __init__(self, device: Device, signature: Signature, batch: int) -> None:
        self.specs = signature.caches
        self.batch = batch
        self.bucket = signature.capacity or 0
        self.sides = 1 if signature.in_place else 2
        self.side = 0
        self._device = device
        self._memory: list[list[Memory]] = []
        try:
            for _ in range(self.sides if self.specs else 0):
                self._memory.append([])
                for spec in self.specs:
                    memory = device.allocate(batch * self.row_bytes(spec))
                    self._memory[-1].append(memory)
                    device.zero(memory.address, memory.nbytes)  # weights of 0 times NaN would be NaN
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(memory.nbytes for side in self._memory for memory in side)

    def row_bytes(self, spec: CacheSpec) -> int:
        """Bytes of one row of one tensor."""
        return spec.heads * self.bucket * spec.entry

    def past(self, index: int, side: int) -> int:
        """The address that a step reads from."""
        return self._memory[side % self.sides][index].address

    def present(self, index: int, side: int) -> int:
        """The address that it writes to."""
        return self._memory[(side + 1) % self.sides][index].address

    def row_window(self, row: int) -> list[tuple[int, int]] | None:
        """(past, present) addresses of one row, tensor by tensor; None where TensorRT could not be given them, for alignment."""
        found = []
        for index, spec in enumerate(self.specs):
            offset = row * self.row_bytes(spec)
            if offset % ALIGNMENT:
                return None
            found.append((self.past(index, self.side) + offset, self.present(index, self.side) + offset))
        return found

    def settle_row(self, row: int, first: int, count: int) -> None:
        """After a row was run by itself: its new entries into the side where the other rows are."""
        if self.sides == 1:
            return
        for index, spec in enumerate(self.specs):
            offset = row * self.row_bytes(spec) + first * spec.entry
            pitch = self.bucket * spec.entry
            to, origin = self.past(index, self.side) + offset, self.present(index, self.side) + offset
            self._device.copy_rows(to, pitch, origin, pitch, count * spec.entry, spec.heads)

    def copy_entries(self, row: int, source: DeviceCache, source_row: int, length: int) -> None:
        """The first `length` entries of another row, which may be of a cache with another capacity."""
        for index, spec in enumerate(self.specs):
            to = self.past(index, self.side) + row * self.row_bytes(spec)
            origin = source.past(index, source.side) + source_row * source.row_bytes(spec)
            self._device.copy_rows(
                to, self.bucket * spec.entry, origin, source.bucket * spec.entry, length * spec.entry, spec.heads
            )

    def reorder(self, sources: Sequence[int], lengths: Sequence[int], scratch: int) -> None:
        """Row i becomes what row sources[i] is. `scratch`: room for one tensor, `largest_tensor` bytes."""
        moved = [row for row, source in enumerate(sources) if row != source]
        for index, spec in enumerate(self.specs):
            base, size, pitch = self.past(index, self.side), self.row_bytes(spec), self.bucket * spec.entry
            for origin, to, rows in (
                (base, scratch, [(row, sources[row]) for row in moved]),
                (scratch, base, [(r, r) for r in moved]),
            ):
                for row, source in rows:
                    width = lengths[sources[row]] * spec.entry
                    self._device.copy_rows(to + row * size, pitch, origin + source * size, pitch, width, spec.heads)

    @property
    def largest_tensor(self) -> int:
        """Bytes of the largest tensor."""
        return max((self.batch * self.row_bytes(spec) for spec in self.specs), default=0)

    def clear(self, row: int, first: int) -> None:
        """Zeros in place of a row's entries from `first` on."""
        for side in range(self.sides):
            for index, spec in enumerate(self.specs):
                base = self.past(index, side) + row * self.row_bytes(spec)
                for head in range(spec.heads):
                    start = base + (head * self.bucket + first) * spec.entry
                    self._device.zero(start, (self.bucket - first) * spec.entry)

    def close(self) -> None:
        """Frees the memory."""
        for side in self._memory:
            for memory in side:
                memory.close()
        self._memory = []
