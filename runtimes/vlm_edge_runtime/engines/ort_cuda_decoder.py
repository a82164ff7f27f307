"""The decoder pair of an ort-cuda build: one session each, and the GPU's decode loop over a cache of any capacity."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime import _native
from vlm_edge_runtime.bundle.manifest import TensorSpec
from vlm_edge_runtime.errors import DeviceError

from .base import Array, SamplingParams
from .decoder_inputs import PAST
from .ort_cuda_place import Place
from .ort_cuda_program import OrtProgram, specs_of, widened
from .tensorrt_contexts import DecoderPrograms
from .tensorrt_decoder import TensorRTDecoder
from .tensorrt_graph import TensorRTGraph
from .tensorrt_program import Program
from .tensorrt_state import TensorRTDecoderState

_ENTRIES = 64
"""Capacities are multiples of this: states of nearly equal size share what was captured, and rows begin aligned."""
_KEPT_IDLE = 2
"""Cache buffers without a state that are kept for the next one of their size: captured graphs stay with their addresses."""


class OrtCudaDecoderState(TensorRTDecoderState):
    """The GPU's decoder state. A decoder without `position_ids` counts positions by its entries, and is told none that differ."""

    def prefill(self, row: int, inputs_embeds: Array, positions: Array, token_inputs: Mapping[str, Array] | None = None) -> None:
        """Appends `inputs_embeds` float32 [S, hidden] at `positions` int64 [S] or [3, S] to one row."""
        if self._counts and positions.size:
            self._check_counted(int(positions.reshape(-1)[0]), row, "position")
        super().prefill(row, inputs_embeds, positions, token_inputs)

    def start(
        self,
        row: int,
        params: SamplingParams,
        history: npt.NDArray[np.int64],
        next_position: int,
        token_inputs: Mapping[str, Array] | None = None,
    ) -> None:
        """Arms a prefilled row for `decode`."""
        if self._counts:
            self._check_counted(next_position, row, "next_position")
        super().start(row, params, history, next_position, token_inputs)

    @property
    def _counts(self) -> bool:
        signature = self.programs.signature
        return not signature.axes and bool(signature.caches)

    def _check_counted(self, position: int, row: int, what: str) -> None:
        length = self.lengths[row] if 0 <= row < self.batch else position
        if position != length:
            raise ValueError(f"this decoder counts positions itself: {what} {position} does not follow {length} entries")


class OrtCudaDecoder(TensorRTDecoder):
    """`engines.base.Decoder`. Raises DeviceError where the two graphs do not fit together."""

    state_type = OrtCudaDecoderState

    def __init__(
        self,
        place: Place,
        decoder: _native.Session,
        embed: _native.Session,
        uncaptured: str | None,
        *,
        times: dict[str, deque[float]],
        prefill_chunk: int,
    ) -> None:
        self._place, self._session, self._uncaptured = place, decoder, uncaptured
        given = {spec.name: spec for spec in specs_of(decoder.inputs, "decoder")}
        gives = {spec.name: spec for spec in specs_of(decoder.outputs, "decoder")}
        fixed = {int(spec.shape[2]) for spec in given.values() if _is_cache(spec) and isinstance(spec.shape[2], int)}
        self._fixed = min(fixed) if fixed else None
        self._cached = any(_is_cache(spec) for spec in given.values())
        self._convert = ("logits", "float32") if "logits" in gives and gives["logits"].dtype == "float16" else None
        if self._cached and not {"seqlens_k", "total_sequence_length"} <= given.keys():
            raise DeviceError(
                "graph 'decoder' has no inputs seqlens_k int32 [batch] and total_sequence_length int32: was it lowered to a "
                "shared cache?"
            )
        wanted, made = given.get("inputs_embeds"), specs_of(embed.outputs, "embed_tokens")
        if wanted is None or len(embed.inputs) != 1 or len(made) != 1 or len(made[0].shape) != 3:
            raise DeviceError(
                "graph 'embed_tokens' is not an embedding of int64 [batch, sequence] into [batch, sequence, hidden]"
            )
        if isinstance(made[0].shape[2], int) and made[0].shape[2] != wanted.shape[-1]:
            raise DeviceError(
                f"graph 'embed_tokens' gives embeddings of width {made[0].shape[2]}, graph 'decoder' takes {wanted.shape[-1]}"
            )
        changed = (made[0].name, wanted.dtype) if made[0].dtype != wanted.dtype else None
        program = OrtProgram(place, embed, "embed_tokens", convert=changed)
        record = times.setdefault("embed_tokens", deque(maxlen=1 << 16)).append
        graph = TensorRTGraph("embed_tokens", program, place.device, program.inputs, widened(program.outputs), record, place.lock)
        super().__init__(
            self._program,
            (self._fixed,) if self._fixed or not self._cached else (),
            graph,
            place.device,
            widened([*given.values(), *gives.values()]),
            sizes=(_width(given, "inputs_embeds"), _width(gives, "logits")),
            lock=place.lock,
            times=times,
            prefill_chunk=prefill_chunk,
        )

    @property
    def uncaptured(self) -> str | None:
        """Why runs of decode steps are not CUDA graphs, or None when they are."""
        return self._uncaptured or self._place.spent or self.counts.not_captured_because or None

    def _bucket_for(self, capacity: int) -> int | None:
        """The graph's own capacity, or the next multiple of 64 entries; None without a cache. Raises DeviceError."""
        if not self._cached:
            return None
        if self._fixed is not None and capacity > self._fixed:
            raise DeviceError(f"graph 'decoder' has a cache of {self._fixed} entries, asked for were {capacity}")
        return self._fixed or -(-capacity // _ENTRIES) * _ENTRIES

    def _program(self, capacity: int | None) -> tuple[Program, Sequence[TensorSpec]]:
        program = OrtProgram(self._place, self._session, "decoder", capacity=capacity, convert=self._convert)
        return program, [*program.inputs, *program.outputs]

    def _bucket(self, capacity: int | None) -> DecoderPrograms:
        found = super()._bucket(capacity)
        found.keeps_idle = _KEPT_IDLE
        return found


def _is_cache(spec: TensorSpec) -> bool:
    return spec.name.startswith(PAST) and len(spec.shape) == 4


def _width(specs: Mapping[str, TensorSpec], name: str) -> int:
    size = specs[name].shape[-1] if name in specs and specs[name].shape else None
    if not isinstance(size, int):
        raise DeviceError(f"graph 'decoder' has no tensor '{name}' whose last dimension is fixed: build it again.")
    return size
