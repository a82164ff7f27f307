"""A decoder's and its embedding's compiled graphs for one cache capacity, with the contexts that decoder states share."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_edge_runtime.errors import DeviceError

from .cuda_device import Device
from .tensorrt_graph import fitting_profile
from .tensorrt_program import Context, Program, Shape
from .tensorrt_signature import Signature

if TYPE_CHECKING:
    from .tensorrt_step import DecoderSteps


@dataclass(slots=True, weakref_slot=True)
class BoundContext:
    """A context with fixed shapes, and what its addresses were last set for. States of one decoder share it."""

    context: Context
    owner: object = None


class DecoderPrograms:
    """Decoder, embedding, and their contexts: those for one row of any length, and those for steps of fixed shapes."""

    def __init__(self, decoder: Program, embed: Program, signature: Signature, device: Device) -> None:
        self.decoder, self.embed, self.signature, self.device = decoder, embed, signature, device
        self.ids = next(info for info in embed.tensors.values() if info.is_input)
        self.embeds = next(info for info in embed.tensors.values() if not info.is_input)
        if self.embeds.dtype != signature.types["inputs_embeds"]:
            raise DeviceError(
                f"graph 'embed_tokens' gives {self.embeds.dtype}, graph 'decoder' takes {signature.types['inputs_embeds']}: "
                "build both for one target."
            )
        self.idle: list[DecoderSteps] = []
        """Steps whose state was closed, the newest first; `keeps_idle` of them serve the next states of their size."""
        self.keeps_idle = 0
        self._rows: dict[int, Context] = {}
        self._fixed: weakref.WeakValueDictionary[object, BoundContext] = weakref.WeakValueDictionary()

    def row_context(self, shapes: Mapping[str, Shape]) -> Context:
        """A context for one row of any length."""
        index = fitting_profile("decoder", self.decoder, shapes)
        if index not in self._rows:
            self._rows[index] = self.decoder.context(index, fixed=False)
        return self._rows[index]

    def fixed(self, role: str, shapes: Mapping[str, Shape]) -> BoundContext:
        """A context of `embed_tokens` or `decoder` with these shapes."""
        key = (role, tuple(sorted(shapes.items())))
        found = self._fixed.get(key)
        if found is None:
            program = self.decoder if role == "decoder" else self.embed
            found = self._fixed[key] = BoundContext(program.context(fitting_profile(role, program, shapes), fixed=True))
            for name, shape in shapes.items():
                found.context.set_shape(name, shape)
        return found

    def close(self) -> None:
        """Frees the decoder and what no state uses."""
        while self.idle:
            self.idle.pop().close()
        self.keeps_idle = 0
        self.decoder.close()

    @property
    def largest_batch(self) -> int | None:
        """Rows that may run together; None: any number."""
        limits = [profile.largest["inputs_embeds"][0] for profile in self.decoder.profiles if "inputs_embeds" in profile.largest]
        return max(limits) if limits else None

    @property
    def longest_row(self) -> int | None:
        """Tokens that one row may have in one run; None: any number."""
        limits = [profile.largest["inputs_embeds"][1] for profile in self.decoder.profiles if "inputs_embeds" in profile.largest]
        return max(limits) if limits else None
