"""The decoder pair of a TensorRT build: one compiled decoder per context bucket, loaded when a state of its size is wanted."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.bundle.manifest import TensorSpec
from vlm_edge_runtime.errors import DeviceError

from .cuda_device import Device
from .tensorrt_contexts import DecoderPrograms
from .tensorrt_counts import StepCounts
from .tensorrt_graph import TensorRTGraph
from .tensorrt_program import Program
from .tensorrt_signature import Signature, read_signature
from .tensorrt_state import TensorRTDecoderState

MAX_BATCH = 1024


class TensorRTDecoder:
    """`engines.base.Decoder`. `capacities`: cache entries of the buckets, ascending (None: a decoder without a cache).

    `sizes`: hidden size and vocabulary. Each bucket's engine has weights of its own on the device: where memory is short, those
    that no state uses are given up.
    """

    state_type = TensorRTDecoderState

    def __init__(
        self,
        load: Callable[[int | None], tuple[Program, Sequence[TensorSpec]]],
        capacities: Sequence[int | None],
        embed: TensorRTGraph,
        device: Device,
        portable: Sequence[TensorSpec],
        *,
        sizes: tuple[int, int],
        lock: threading.RLock,
        times: dict[str, deque[float]],
        prefill_chunk: int = 0,
    ) -> None:
        if len(embed.inputs) != 1 or len(embed.outputs) != 1:
            raise DeviceError("graph 'embed_tokens' must have one input and one output: build it again.")
        self.capacities = tuple(capacities)
        self.counts = StepCounts()
        self._load, self._embed, self._device, self._portable = load, embed, device, portable
        self._lock, self._times, self._prefill_chunk = lock, times, prefill_chunk
        self._programs: dict[int | None, DecoderPrograms] = {}
        self._states: weakref.WeakSet[TensorRTDecoderState] = weakref.WeakSet()
        self._closed = False
        self.hidden_size, self.vocab_size = sizes

    @property
    def signature(self) -> Signature:
        """Of the smallest bucket; the others differ from it in the capacity alone."""
        return self._bucket(self.capacities[0]).signature

    @property
    def embedding(self) -> TensorRTGraph:
        """The graph `embed_tokens`."""
        return self._embed

    def embed(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Token embeddings: int64 [S] → float32 [S, hidden]."""
        if input_ids.ndim != 1:
            raise ValueError(f"input_ids has {input_ids.ndim} dimensions, expected 1")
        (given,), (output,) = self._embed.inputs, self._embed.outputs
        found = self._embed.run({given.name: np.asarray(input_ids, np.int64)[None]})[output.name][0]
        return np.asarray(found, np.float32)

    def allocate(self, batch: int, capacity: int) -> TensorRTDecoderState:
        """A new, empty cache in the smallest bucket that holds `capacity` entries a row.

        Raises ValueError, or DeviceError naming the largest bucket when none does, and when the memory cannot be had.
        """
        if not 1 <= batch <= MAX_BATCH or capacity < 1:
            raise ValueError(f"batch {batch}, capacity {capacity}: expected 1 to {MAX_BATCH}, 1 or more")
        with self._lock:
            if self._closed:
                raise DeviceError("the decoder is closed")
            bucket = self._bucket_for(capacity)
            self._device.use()
            try:
                state = self._state(bucket, batch, capacity)
            except DeviceError:
                if not self._give_up_idle(bucket):
                    raise
                state = self._state(bucket, batch, capacity)
            self._states.add(state)
            return state

    def _bucket_for(self, capacity: int) -> int | None:
        """The smallest bucket that holds so many entries; None for a decoder without a cache."""
        for size in self.capacities:
            if size is None or size >= capacity:
                return size
        raise DeviceError(
            f"a cache of {capacity} entries was asked for, the largest one that this build has an engine for is "
            f"{self.capacities[-1]}: load with context_length={self.capacities[-1]} or less, or build with a larger context."
        )

    def _state(self, bucket: int | None, batch: int, capacity: int) -> TensorRTDecoderState:
        programs = self._bucket(bucket)
        most = programs.largest_batch
        if most is not None and batch > most:
            raise DeviceError(
                f"{batch} rows were asked for (prompts × beams), the decoder's engine was built for {most} at once: send fewer, "
                "or build the target with a larger max_batch."
            )
        return self.state_type(
            programs,
            batch,
            capacity,
            lock=self._lock,
            counts=self.counts,
            record=self._record,
            prefill_chunk=self._prefill_chunk,
        )

    def _give_up_idle(self, wanted: int | None) -> bool:
        """Frees the engines of other buckets that no open state uses. Whether there were any."""
        used = [state.programs for state in self._states if not state.closed]
        idle = [size for size, programs in self._programs.items() if size != wanted and programs not in used]
        for size in idle:
            self._programs.pop(size).close()
        return bool(idle)

    def _bucket(self, capacity: int | None) -> DecoderPrograms:
        with self._lock:
            if self._closed:
                raise DeviceError("the decoder is closed")
            if capacity not in self._programs:
                program, specs = self._load(capacity)
                signature = read_signature(program, specs, self._portable)
                if signature.capacity != capacity:
                    raise DeviceError(
                        f"the manifest says {capacity} cache entries of the decoder's engine, which has {signature.capacity}: "
                        "build it again."
                    )
                self._programs[capacity] = DecoderPrograms(program, self._embed.program, signature, self._device)
            return self._programs[capacity]

    def _record(self, role: str, seconds: float, count: int) -> None:
        times = self._times.get(role)
        if times is not None:
            times.extend([seconds] * count)

    def close(self) -> None:
        """Frees the engines, and the states with them."""
        with self._lock:
            self._closed = True
            for state in list(self._states):
                state.close()
            for programs in self._programs.values():
                programs.close()
            self._programs.clear()
            self._embed.close()
