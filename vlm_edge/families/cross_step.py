"""One step of a decoder that reads an encoder: its cross-attention's keys and values are given, not computed.

Not a family: a part of cross_decoder.py. For encoder-decoder text models (T5, arXiv 1910.10683; BART, 1910.13461) and for
decoders with cross-attention layers (BERT, GPT-2, TrOCR …). Some of them count positions from the length of their cache. A
runtime decodes rows of unlike length together, so the traced decoder is told each token's position (`position_ids`) instead; see
export/patches/positions.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from vlm_edge.export.attention import PastCache, StaticLayer, attention_implementation
from vlm_edge.export.patches.positions import counts_ids, position_offset, positions
from vlm_edge_runtime.bundle.manifest import KVLayout
from vlm_edge_runtime.errors import UnsupportedModelError

from .base import Part
from .decoder import Arguments


@dataclass(frozen=True, slots=True)
class Sizes:
    """What `probe` finds: the self-attention cache, the cross-attending layers with heads and width, hidden size, vocabulary."""

    kv: KVLayout
    cross_layers: tuple[int, ...]
    cross_heads: int
    cross_head_dim: int
    hidden: int
    vocabulary: int

    @property
    def cross_names(self) -> list[str]:
        """The static inputs, `cross_key_values.{i}.key/.value`; `i` counts cross-attending layers."""
        return [f"cross_key_values.{i}.{part}" for i in range(len(self.cross_layers)) for part in ("key", "value")]


class CrossDecoder(torch.nn.Module):
    """One step of a decoder with cross-attention, in the form that `decoder_plan` calls and with the original's results.

    `model`: an encoder-decoder (T5, BART …; anything called with `decoder_inputs_embeds`) or a decoder called with
    `encoder_hidden_states`. `width`: that of the encoder's hidden states. Given a `PastCache` it is being traced; otherwise it is
    the reference, and rows with padding (of prompt or source) run alone and without it: padding must not change anything.
    """

    def __init__(self, model: Part, width: int) -> None:
        super().__init__()
        self.model: Part = model
        self.config = model.config
        self.width = width
        names = inspect.signature(model.forward).parameters
        self._whole = "decoder_inputs_embeds" in names
        if not self._whole and "encoder_hidden_states" not in names:
            raise UnsupportedModelError(
                f"The decoder '{model.config.model_type}' has no cross-attention: it cannot read an encoder."
            )
        self._positioned = "position_ids" in names and not self._whole
        self._offset = position_offset(model) if self._positioned else 0
        self._told = counts_ids(model)
        self.sizes = self._probe()

    def get_input_embeddings(self) -> torch.nn.Module:
        embedding: torch.nn.Module = self.model.get_input_embeddings()
        return embedding

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Any,
        encoder_attention_mask: torch.Tensor | None = None,
        **rest: Any,
    ) -> Any:
        static = [rest[name] for name in self.sizes.cross_names]
        if isinstance(past_key_values, PastCache):
            with positions(self.model, position_ids, attention_mask):
                return self._step(inputs_embeds, attention_mask, position_ids, past_key_values, encoder_attention_mask, static)
        padded = [mask for mask in (attention_mask, encoder_attention_mask) if mask is not None and not mask.all()]
        if not padded:
            return self._step(inputs_embeds, attention_mask, position_ids, past_key_values, encoder_attention_mask, static)
        return self._rows(inputs_embeds, attention_mask, position_ids, past_key_values, encoder_attention_mask, static)

    def fill(self, encoder_hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values of every cross-attending layer, as the model computes them while it reads its first token."""
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        batch = encoder_hidden_states.shape[0]
        dummy = torch.zeros(batch, 1, self.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long)).shape[-1])
        self._call(dummy, torch.ones(batch, 1, dtype=torch.long), None, encoder_hidden_states, None, cache)
        layers = cache.cross_attention_cache.layers
        return [tensor for layer in layers if layer.is_initialized for tensor in (layer.keys, layer.values)]

    def _call(
        self,
        embeddings: torch.Tensor,
        mask: torch.Tensor,
        position_ids: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor,
        encoder_mask: torch.Tensor | None,
        cache: Cache,
    ) -> Any:
        arguments: Arguments = {"past_key_values": cache, "use_cache": True, "return_dict": True}
        if self._whole:
            outputs = BaseModelOutput(last_hidden_state=encoder_hidden_states)
            arguments |= {"encoder_outputs": outputs, "attention_mask": encoder_mask}
            arguments |= {"decoder_inputs_embeds": embeddings, "decoder_attention_mask": mask}
        else:
            arguments |= {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_mask}
            arguments |= {"inputs_embeds": embeddings, "attention_mask": mask}
            if self._positioned and position_ids is not None:
                arguments["position_ids"] = position_ids + self._offset
        if not self._told:
            return self.model(**arguments)
        if position_ids is None:
            position_ids = torch.arange(embeddings.shape[1])[None]
        with positions(self.model, position_ids, mask):
            return self.model(**arguments)

    def _step(
        self,
        embeddings: torch.Tensor,
        mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Cache,
        encoder_mask: torch.Tensor | None,
        static: Sequence[torch.Tensor],
    ) -> Any:
        layers: list[Any] = [DynamicLayer() for _ in range(self.sizes.kv.layers)]
        for i, layer in enumerate(self.sizes.cross_layers):
            layers[layer] = StaticLayer(i, static[2 * i], static[2 * i + 1])
        cache = EncoderDecoderCache(past, Cache(layers=layers))
        cache.is_updated = dict.fromkeys(range(len(layers)), True)
        batch, _, source, _ = static[0].shape
        read = torch.zeros(batch, source, self.width)  # only its shape counts: the keys are there already
        return self._call(embeddings, mask, position_ids, read, encoder_mask, cache)

    def _rows(
        self,
        embeddings: torch.Tensor,
        mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: DynamicCache,
        encoder_mask: torch.Tensor | None,
        static: Sequence[torch.Tensor],
    ) -> Any:
        """The original on every row alone, without its padding; what stands at padding in the results is zero."""
        kv, entries = self.sizes.kv, mask.shape[1]
        before = entries - embeddings.shape[1]
        found: list[tuple[torch.Tensor, ...]] = []
        for row in range(len(mask)):
            padding = int((mask[row] == 0).sum())
            old, new = min(padding, before), max(padding - before, 0)
            cache = DynamicCache()
            if before > old:
                for layer, kept in enumerate(past.layers):
                    key, value = kept.keys[row : row + 1, :, old:], kept.values[row : row + 1, :, old:]
                    cache.update(key.clone(), value.clone(), layer)
            real = torch.ones(static[0].shape[2], dtype=torch.bool) if encoder_mask is None else encoder_mask[row].bool()
            output = self._step(
                embeddings[row : row + 1, new:].clone(),
                mask[row : row + 1, padding:],
                position_ids[row : row + 1, new:],
                cache,
                None,
                [tensor[row : row + 1, :, real] for tensor in static],
            )
            one = [torch.nn.functional.pad(output.logits, (0, 0, new, 0))]
            for layer in cache.layers:
                one += [torch.nn.functional.pad(tensor, (0, 0, padding, 0)) for tensor in (layer.keys, layer.values)]
            found.append(tuple(one))
        logits, *present = (torch.cat(parts) for parts in zip(*found, strict=True))
        past.layers = []
        for layer_index in range(kv.layers):
            past.update(present[2 * layer_index], present[2 * layer_index + 1], layer_index)
        output.logits = logits
        return output

    def _probe(self) -> Sizes:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with torch.no_grad(), attention_implementation(self.model, "eager"):
            embeddings = self.get_input_embeddings()(torch.zeros(1, 2, dtype=torch.long)).clone()
            mask, read = torch.ones(1, 2, dtype=torch.long), torch.zeros(1, 3, self.width)
            try:
                logits = self._call(embeddings, mask, None, read, None, cache).logits
            except ValueError as error:  # how transformers says that there are no such layers
                said = " ".join(str(error).split())[-160:]
                raise UnsupportedModelError(f"The decoder '{self.config.model_type}' cannot read an encoder: {said}.") from error
        shapes = [
            {tuple(layer.keys.shape) for layer in part.layers if layer.is_initialized}
            for part in (cache.self_attention_cache, cache.cross_attention_cache)
        ]
        if not shapes[1]:
            raise UnsupportedModelError(
                f"The decoder '{self.config.model_type}' has no cross-attention: it cannot read an encoder."
            )
        if len(shapes[0]) != 1 or len(shapes[1]) != 1:
            raise UnsupportedModelError(f"The decoder's layers keep caches of different shapes ({shapes}); one is expected.")
        (own,), (cross,) = shapes
        crossing = [i for i, layer in enumerate(cache.cross_attention_cache.layers) if layer.is_initialized]
        return Sizes(
            kv=KVLayout(layers=len(cache.self_attention_cache.layers), kv_heads=own[1], head_dim=own[3]),
            cross_layers=tuple(crossing),
            cross_heads=cross[1],
            cross_head_dim=cross[3],
            hidden=embeddings.shape[-1],
            vocabulary=logits.shape[-1],
        )
