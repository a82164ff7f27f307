"""One row of a decoder state run by itself: prefill, at any number of tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .base import Array
from .cuda_memory import Buffers
from .tensorrt_program import Context, Shape
from .tensorrt_types import as_taken

if TYPE_CHECKING:
    from .tensorrt_step import DecoderSteps


class RowRuns:
    """Runs rows of `steps`, each as a batch of one whose cache is the row's window of the whole."""

    def __init__(self, steps: DecoderSteps) -> None:
        self._steps = steps
        self.buffers = Buffers(steps.device)
        self._static_key: object = None

    def run(self, row: int, feeds: Mapping[str, Array], statics: Mapping[str, Array], static_key: object) -> dict[str, Array]:
        """Appends tokens to a row: `feeds` has all but caches and states, [1, …] each; `statics` are sent again when the key is

        another one. The row's logits and states are set; further outputs are returned whole. The table is the caller's.
        """
        types, device = self._steps.signature.types, self._steps.device
        first, tokens = int(self._steps.table[row]["length"]), feeds["inputs_embeds"].shape[1]
        given = {name: as_taken(name, array, types[name]) for name, array in {**feeds, **statics}.items() if name in types}
        shapes: dict[str, Shape] = {name: array.shape for name, array in given.items()}
        shapes |= {name: (1, *map(int, self._steps.signature.specs[name].shape[1:])) for name in self._steps.signature.states}
        shapes |= {
            spec.past: (1, *map(int, self._steps.signature.specs[spec.past].shape[1:])) for spec in self._steps.signature.caches
        }
        context = self._steps.programs.row_context(shapes)
        for name, shape in shapes.items():
            context.set_shape(name, shape)
        for name, array in given.items():
            kept = name in statics and static_key == self._static_key
            context.set_address(name, self.buffers.reserve(name, array.nbytes) if kept else self.buffers.put(name, array))
        self._static_key = static_key
        staged = self._bind_row_cache(context, row)
        for name, following in self._steps.signature.states.items():
            size = self._steps.state_bytes(name)
            before, after = self.buffers.reserve(name, size), self.buffers.reserve(following, size)
            device.copy(before, self._steps.state_address(name, row), size)
            context.set_address(name, before)
            context.set_address(following, after)
        context.set_address("logits", self._steps.logits_address(row))
        outputs = {
            spec.name: np.empty(context.output_shape(spec.name), types[spec.name]) for spec in self._steps.signature.further
        }
        for name, array in outputs.items():
            context.set_address(name, self.buffers.reserve(name, array.nbytes))
        context.set_total(first + tokens)
        begin = time.perf_counter()
        context.enqueue(device.stream)
        for name, following in self._steps.signature.states.items():
            size = self._steps.state_bytes(name)
            device.copy(self._steps.state_address(name, row), self.buffers.reserve(following, size), size)
        self._settle(row, first, tokens, staged)
        for name, array in outputs.items():
            device.download(array, self.buffers.reserve(name, array.nbytes))
        device.synchronize()
        self._steps.last_seconds = time.perf_counter() - begin
        self._steps.counts.rows += 1
        return outputs

    def forget(self) -> None:
        """What was sent for a row is another state's."""
        self._static_key = None

    def _bind_row_cache(self, context: Context, row: int) -> bool:
        """A row is a window of the cache; where TensorRT could not take its address, a copy. Whether it is one."""
        window = self._steps.cache.row_window(row)
        for index, spec in enumerate(self._steps.cache.specs):
            if window is not None:
                past, present = window[index]
            else:
                size = self._steps.cache.row_bytes(spec)
                past = present = self.buffers.reserve(spec.past, size)
                if self._steps.cache.sides > 1:
                    present = self.buffers.reserve(spec.present, size)
                self._steps.device.copy(past, self._steps.cache.past(index, self._steps.cache.side) + row * size, size)
            context.set_address(spec.past, past)
            context.set_address(spec.present, present)
        return window is None

    def _settle(self, row: int, first: int, tokens: int, staged: bool) -> None:
        if not staged:
            self._steps.cache.settle_row(row, first, tokens)
            return
        for index, spec in enumerate(self._steps.cache.specs):
            size = self._steps.cache.row_bytes(spec)
            name = spec.past if self._steps.cache.sides == 1 else spec.present
            to = self._steps.cache.past(index, self._steps.cache.side) + row * size
            self._steps.device.copy(to, self.buffers.reserve(name, size), size)
