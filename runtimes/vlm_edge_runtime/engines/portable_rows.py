"""Rows of a portable decoder, and how some of them run through its graphs as one batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime import _native
from vlm_edge_runtime.bundle.manifest import TensorSpec
from vlm_edge_runtime.errors import DeviceError

from .base import Array, Graph, SamplingParams
from .decoder_inputs import PAST, DecoderInputs, Sizes, newest
from .native_ort import embed_row, fixed_size

Named = dict[str, Array]


@dataclass(slots=True)
class Row:
    """One row's cache (batch 1, no padding), what it is bound to, and its place in the token loop."""

    cache: Named
    bound: Named | None = None
    bound_sizes: Sizes = field(default_factory=dict)
    used: bool = False
    """Whether anything ran since it was bound."""
    recurrent: Named = field(default_factory=dict)
    sizes: Sizes = field(default_factory=dict)
    token_inputs: Named | None = None
    outputs: Named = field(default_factory=dict)
    length: int = 0
    logits: npt.NDArray[np.float32] | None = None
    pending: int | None = None
    pushed: bool = False
    next_position: int = 0
    sampler: _native.Sampler | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    armed: bool = False
    finished: bool = False

    @property
    def active(self) -> bool:
        return self.armed and not self.finished

    def forget(self) -> None:
        self.logits = None
        self.pending = None
        self.token_inputs = None
        self.outputs = {}
        self.pushed = self.armed = self.finished = False


class RowGraphs(Protocol):
    """What a loop over rows needs of the graphs that run them."""

    inputs: DecoderInputs
    vocab_size: int
    position_axes: int

    def embed(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Token embeddings: int64 [S] → float32 [S, hidden]."""

    def empty_cache(self) -> Named:
        """A past of no entries for one row."""

    def run(self, rows: list[Row], embeds: Array, mask: Array, positions: Array, given: Named, statics: Named) -> None:
        """Runs the decoder on these rows and puts each one's share of what it gives in place."""


class PortableGraphs:
    """The portable `embed_tokens` and `decoder` graphs, and the decoder's signature."""

    def __init__(self, decoder: Graph, embed_tokens: Graph) -> None:
        self._decoder = decoder
        self._embed = embed_tokens
        self._specs = {spec.name: spec for spec in decoder.inputs}
        if "seqlens_k" in self._specs:
            raise DeviceError("graph 'decoder' is not a portable decoder: it was lowered to a shared cache")
        self.inputs = DecoderInputs("decoder", decoder.inputs)
        self.hidden_size = fixed_size(decoder.inputs, "decoder", "inputs_embeds")
        self.vocab_size = fixed_size(decoder.outputs, "decoder", "logits")
        positions = self._specs.get("position_ids")
        rank3 = positions is not None and len(positions.shape) == 3
        self.position_axes = int(positions.shape[0]) if positions is not None and rank3 else 1
        following = {f"present.{name.removeprefix(PAST)}" for name in self._specs if name.startswith(PAST)}
        following |= {f"present_{name}" for name in self.inputs.recurrent} | {"logits"}
        if missing := following - {spec.name for spec in decoder.outputs}:
            raise DeviceError(f"graph 'decoder' is not a portable decoder: it has no output {', '.join(sorted(missing))}")
        self.further_outputs: tuple[TensorSpec, ...] = tuple(spec for spec in decoder.outputs if spec.name not in following)

    def embed(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Token embeddings: int64 [S] → float32 [S, hidden]."""
        return embed_row(self._embed, input_ids)

    def close(self) -> None:
        """Frees both sessions."""
        self._decoder.close()
        self._embed.close()

    def empty_cache(self) -> Named:
        """A past of no entries for one row."""
        cache: Named = {}
        for name, spec in self._specs.items():
            if name.startswith(PAST):
                _, heads, _, width = spec.shape
                cache[name] = np.empty((1, int(heads), 0, int(width)), dtype=spec.dtype)
        return cache

    def run(self, rows: list[Row], embeds: Array, mask: Array, positions: Array, given: Named, statics: Named) -> None:
        """Runs the decoder on these rows and puts each one's share of what it gives in place."""
        longest, tokens = max(row.length for row in rows), embeds.shape[1]
        cache = {name: _together([_pad_left(row.cache[name], longest) for row in rows]) for name in rows[0].cache}
        recurrent = {name: _together([row.recurrent[name] for row in rows]) for name in self.inputs.recurrent}
        feeds: Named = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        feeds |= statics | given | recurrent | cache
        outputs = self._decoder.run({name: array for name, array in feeds.items() if name in self._specs})
        logits = np.asarray(outputs["logits"][:, -1], dtype=np.float32)
        for at, row in enumerate(rows):
            row.cache = {
                name: outputs[f"present.{name.removeprefix(PAST)}"][at : at + 1, :, longest - row.length :] for name in row.cache
            }
            row.recurrent = {name: outputs[f"present_{name}"][at : at + 1] for name in recurrent}
            row.length += tokens
            row.used = True
            sizes = row.sizes | {"total": row.length}
            row.outputs = {spec.name: newest(spec, outputs[spec.name], at, sizes) for spec in self.further_outputs}
            row.logits = logits[at]


def _pad_left(array: Array, entries: int) -> Array:
    """[1, heads, n, width] with zero entries in front, so that it has `entries` of them."""
    missing = entries - array.shape[2]
    return np.pad(array, ((0, 0), (0, 0), (missing, 0), (0, 0))) if missing else array


def _together(arrays: list[Array]) -> Array:
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
