"""Graphs in ONNX Runtime's Python sessions: encoders by host arrays, decoders by addresses that are bound once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.bundle.manifest import TensorSpec
from vlm_edge_runtime.errors import DeviceError

from .base import Array
from .decoder_inputs import PAST, DecoderInputs
from .native_ort import fixed_size
from .ort_cuda_models import cast, greedy_sampler
from .ort_cuda_place import Place

_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
_LENGTHS = ("seqlens_k", "total_sequence_length")


class OrtGraph:
    """One graph in a session of a place. Half precision is its own affair: it takes and gives float32 in its stead."""

    def __init__(self, place: Place, session: Any, role: str, record: Callable[[float], None]) -> None:
        self.role = role
        self.session = session
        self.place = place
        self.record = record
        self._real = {spec.name: spec.dtype for spec in signature(session.get_inputs(), role)}
        self.inputs = widened(signature(session.get_inputs(), role))
        self.outputs = widened(signature(session.get_outputs(), role))
        self._closed = False

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs for the named inputs. Raises DeviceError naming the graph."""
        if self._closed:
            raise DeviceError(f"graph '{self.role}' is closed")
        given = {name: _as_given(array, self._real.get(name)) for name, array in feeds.items()}
        names = [spec.name for spec in self.outputs]
        begin = time.perf_counter()
        with self.place.lock:
            try:
                found = self.session.run(names, given, run_options(-1))
            except Exception as error:  # onnxruntime raises bare Exceptions of its own
                raise run_failed(self.role, error) from error
        self.record(time.perf_counter() - begin)
        return {name: _as_float32(np.asarray(array)) for name, array in zip(names, found, strict=True)}

    def close(self) -> None:
        """Lets go of the session; states that run on it keep it."""
        self._closed = True

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed


@dataclass(slots=True, frozen=True)
class CacheTensor:
    """One cache tensor of the graph: [batch, heads, capacity, width] of `dtype`."""

    past: str
    present: str
    heads: int
    width: int
    dtype: str
    fixed: tuple[int | None, int | None]
    """Batch and capacity, where the graph fixes them."""

    @property
    def entry_bytes(self) -> int:
        """Bytes of one head's entry."""
        return self.width * np.dtype(self.dtype).itemsize

    def row_bytes(self, capacity: int) -> int:
        """Bytes of one row."""
        return self.heads * capacity * self.entry_bytes


class DecoderGraphs:
    """`embed_tokens`, `decoder` on a shared cache and what runs between and after them, with the decoder's signature.

    Raises DeviceError where the two do not fit together.
    """

    def __init__(self, decoder: OrtGraph, embed: OrtGraph, uncaptured: str | None) -> None:
        self.place = decoder.place
        self.decoder, self.embedding = decoder, embed
        self.types = {spec.name: spec.dtype for spec in signature(decoder.session.get_inputs(), "decoder")}
        shapes = {spec.name: spec.shape for spec in decoder.inputs}
        self.inputs = DecoderInputs("decoder", [spec for spec in decoder.inputs if spec.name not in _LENGTHS])
        self.hidden_size = fixed_size(decoder.inputs, "decoder", "inputs_embeds")
        self.vocab_size = fixed_size(decoder.outputs, "decoder", "logits")
        positions = shapes.get("position_ids")
        self.position_rank = len(positions) if positions is not None else 0
        self.position_axes = int(positions[0]) if positions is not None and self.position_rank == 3 else 1
        self.counts_lengths = "seqlens_k" in shapes
        self.total_shape = [1] * len(shapes.get("total_sequence_length", ()))
        self.caches = tuple(_cache(spec, self.types[spec.name], decoder.outputs) for spec in decoder.inputs if _is_past(spec))
        if self.caches and not self.counts_lengths:
            raise DeviceError(
                "graph 'decoder' has no inputs seqlens_k int32 [batch] and total_sequence_length int32: was it lowered to a "
                "shared cache?"
            )
        self.presents = {name: f"present_{name}" for name in self.inputs.recurrent}
        own = {"logits", *(cache.present for cache in self.caches), *self.presents.values()}
        names = {spec.name for spec in decoder.outputs}
        if missing := own - names:
            raise DeviceError(f"graph 'decoder' has no output {', '.join(sorted(missing))}")
        self.further_outputs = tuple(spec for spec in decoder.outputs if spec.name not in own)
        self.embed_type = _embedding_type(embed, self.hidden_size)
        self.logits_type = next(s.dtype for s in signature(decoder.session.get_outputs(), "decoder") if s.name == "logits")
        wanted = self.types["inputs_embeds"]
        self.cast = None
        if wanted != self.embed_type:
            self.cast, _ = self.place.session(cast(self.hidden_size, self.embed_type, wanted), "embeddings", captured=True)
        self.sampler, _ = self.place.session(greedy_sampler(self.vocab_size, self.logits_type), "greedy_sampler", captured=True)
        self.uncaptured = uncaptured
        """Why decode steps are not CUDA graphs, or None when they are."""
        if uncaptured is None and (self.inputs.bound or self.inputs.tokens or self.further_outputs):
            self.uncaptured = "the decoder has inputs or outputs whose shapes change with the prompt"

    @property
    def host_outputs(self) -> tuple[str, ...]:
        """Outputs that are fetched after every run: recurrent states and further outputs."""
        return (*self.presents.values(), *(spec.name for spec in self.further_outputs))

    def embed(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Token embeddings on the host: int64 [S] → float32 [S, hidden]."""
        if input_ids.ndim != 1:
            raise ValueError(f"input_ids has {input_ids.ndim} dimensions, expected 1")
        name, output = self.embedding.inputs[0].name, self.embedding.outputs[0].name
        return np.asarray(self.embedding.run({name: np.asarray(input_ids, np.int64)[None]})[output][0], np.float32)

    def empty_cache(self) -> dict[str, Array]:
        """Rows keep no arrays of their own: the cache is in the buffers."""
        return {}

    def close(self) -> None:
        """Refuses further use; states go on."""
        self.decoder.close()
        self.embedding.close()


def run_options(graph_id: int, *, wait: bool = True) -> Any:
    """onnxruntime.RunOptions: which captured graph (−1: none), and whether the call returns only when the device is done."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    if not wait:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def run_failed(role: str, error: Exception) -> DeviceError:
    """ONNX Runtime's refusal of a run as this package's error."""
    return DeviceError(f"graph '{role}': {' '.join(str(error).split())[:900]}")


def signature(values: Sequence[Any], role: str) -> tuple[TensorSpec, ...]:
    """ONNX Runtime's NodeArgs as specs. Raises DeviceError for a type that no numpy array has."""
    specs = []
    for value in values:
        if value.type not in _TYPES:
            raise DeviceError(f"graph '{role}': '{value.name}' is a {value.type}; expected is one of {', '.join(_TYPES)}")
        shape = tuple(size if isinstance(size, int) else str(size or "") for size in value.shape)
        specs.append(TensorSpec(name=value.name, dtype=_TYPES[value.type], shape=shape))
    return tuple(specs)


def widened(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The specs with float32 in place of float16."""
    return tuple(TensorSpec(name=s.name, dtype="float32" if s.dtype == "float16" else s.dtype, shape=s.shape) for s in specs)


def _as_given(array: Array, wanted: str | None) -> Array:
    """Contiguous, and in half precision where the graph takes that. Other types are ONNX Runtime's to refuse."""
    if wanted == "float16" and array.dtype == np.float32:
        array = array.astype(np.float16)
    return np.ascontiguousarray(array) if array.ndim else array


def _as_float32(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _is_past(spec: TensorSpec) -> bool:
    return spec.name.startswith(PAST)


def _cache(spec: TensorSpec, dtype: str, outputs: Sequence[TensorSpec]) -> CacheTensor:
    present = f"present.{spec.name.removeprefix(PAST)}"
    if all(output.name != present for output in outputs):
        raise DeviceError(f"graph 'decoder': '{spec.name}' has no output '{present}'")
    batch, heads, capacity, width = spec.shape if len(spec.shape) == 4 else ("", "", "", "")
    if not isinstance(heads, int) or not isinstance(width, int):
        raise DeviceError(f"graph 'decoder': '{spec.name}' is not [batch, kv_heads, capacity, head_dim] with fixed heads")
    fixed = (batch if isinstance(batch, int) else None, capacity if isinstance(capacity, int) else None)
    return CacheTensor(spec.name, present, heads, width, dtype, fixed)


def _embedding_type(embed: OrtGraph, hidden: int) -> str:
    outputs = signature(embed.session.get_outputs(), "embed_tokens")
    fits = len(embed.inputs) == len(outputs) == 1 and embed.inputs[0].dtype == "int64" and len(outputs[0].shape) == 3
    if not fits or outputs[0].dtype not in ("float32", "float16"):
        raise DeviceError("graph 'embed_tokens' is not an embedding of int64 [batch, sequence] into [batch, sequence, hidden]")
    width = outputs[0].shape[2]
    if isinstance(width, int) and width != hidden:
        raise DeviceError(f"graph 'embed_tokens' gives embeddings of width {width}, graph 'decoder' takes {hidden}")
    return outputs[0].dtype
