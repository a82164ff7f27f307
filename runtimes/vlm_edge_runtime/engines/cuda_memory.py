"""Device memory that grows when more is asked of it, by name."""

from __future__ import annotations

from .base import Array
from .cuda_device import Device, Memory


class Buffers:
    """Named pieces of device memory. `generation` counts how often an address changed: what was captured before is then stale."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.generation = 0
        self._memory: dict[str, Memory] = {}

    def reserve(self, name: str, nbytes: int, *, zeroed: bool = False) -> int:
        """The address of at least `nbytes`; what was there before is lost when it has to grow."""
        known = self._memory.get(name)
        if known is None or known.nbytes < nbytes:
            if known is not None:
                self.device.synchronize()  # something queued may still use it
                known.close()
            known = self._memory[name] = self.device.allocate(max(nbytes, 1))
            self.generation += 1
            if zeroed:
                self.device.zero(known.address, known.nbytes)
        return known.address

    def address(self, name: str) -> int:
        """Where something is that was reserved before."""
        return self._memory[name].address

    def put(self, name: str, array: Array) -> int:
        """The address of a copy of a C-contiguous array."""
        address = self.reserve(name, array.nbytes)
        self.device.upload(address, array)
        return address

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(memory.nbytes for memory in self._memory.values())

    def close(self) -> None:
        """Frees everything."""
        for memory in self._memory.values():
            memory.close()
        self._memory.clear()
