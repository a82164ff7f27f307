"""Llama 3.2 Vision (Mllama): a part of family `gated_cross_attention`.

Some layers of the decoder are gated cross-attention layers (arXiv 2407.21783, section 7.2) and keep no cache of the text: what
they read is the same at every token. An image is up to `max_num_tiles` tiles in one of the aspect ratios that they can form;
tiles that it does not have are masked, in the vision encoder and for every token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from vlm_edge.export.attention import PastCache, StaticLayer, attention_implementation
from vlm_edge_runtime.bundle.manifest import KVLayout
from vlm_edge_runtime.errors import UnsupportedModelError

from .base import Case, GraphPlan, Part, Single, Tensors, float32, int64, randn, sequence_of_cases
from .decoder import Arguments, ExtraInput, decoder_plan
from .gated_parts import MASK, Gated

_IMAGES = 3


def mllama(model: Part, context_length: int) -> Gated:
    """The graphs of a Mllama checkpoint."""
    inner = model.model
    vision = inner.vision_model
    entries = int(vision.max_num_tiles * vision.num_patches)
    reading = _Reading(model, entries)
    kv, hidden, vocabulary = reading.probe()
    extras = [
        _mask_input(int(vision.max_num_tiles)),
        _real_input(entries),
        *(reading.static(at) for at in range(len(reading.names))),
    ]
    sizes = {"images": _IMAGES, "source": _IMAGES * entries}
    return Gated(
        features=(_vision_plan(vision), _projector_plan(inner)),
        cross_kv=_cross_kv_plan(reading),
        decoder=decoder_plan(reading, kv, hidden, vocabulary, context_length, extras=extras, sizes=sizes),
        kv=kv,
        hidden=hidden,
        vocabulary=vocabulary,
        source_width=hidden,
        entries_per_image=entries,
    )


class _Vision(torch.nn.Module):
    """`pixel_values [images, tiles, channels, height, width]`, `aspect_ratio_ids [images]`, `aspect_ratio_mask [images, tiles]` →

    `image_hidden_states [images, entries, width]`, the tiles' patches one after another.
    """

    def __init__(self, vision: Part) -> None:
        super().__init__()
        self.vision: Part = vision

    def forward(self, pixel_values: torch.Tensor, aspect_ratio_ids: torch.Tensor, aspect_ratio_mask: torch.Tensor) -> Tensors:
        states = self.vision(
            pixel_values=pixel_values[:, None],
            aspect_ratio_ids=aspect_ratio_ids[:, None],
            aspect_ratio_mask=aspect_ratio_mask[:, None],
        ).last_hidden_state
        return (states.reshape(states.shape[0], -1, states.shape[-1]),)


def _vision_plan(vision: Part) -> GraphPlan:
    config, graph = vision.config, _Vision(vision)
    tiles, size = int(config.max_num_tiles), int(config.image_size)
    inputs = (
        float32("pixel_values", "images", tiles, int(config.num_channels), size, size),
        int64("aspect_ratio_ids", "images"),
        int64("aspect_ratio_mask", "images", tiles),
    )

    def sample(case: Case) -> Tensors:
        """Images of unlike aspect ratios; the tiles that they do not have are zero."""
        ratios = config.supported_aspect_ratios
        ids = torch.tensor([(2 * row + case.sizes["images"]) % len(ratios) + 1 for row in range(case.sizes["images"])])
        counts = torch.tensor([ratios[number - 1][0] * ratios[number - 1][1] for number in ids.tolist()])
        mask = (torch.arange(tiles)[None] < counts[:, None]).long()
        return randn(inputs[0], case) * mask[..., None, None, None], ids, mask

    return GraphPlan(
        role="vision_encoder",
        module=graph,
        inputs=inputs,
        outputs=(float32("image_hidden_states", "images", tiles * int(vision.num_patches), int(config.vision_output_dim)),),
        cases=tuple(Case(f"{n} image{'s' * (n > 1)}", {"images": n}) for n in (2, 1, 3)),
        sample=sample,
        reference=lambda case, tensors: graph(*(tensor.clone() for tensor in tensors)),
    )


def _projector_plan(inner: Part) -> GraphPlan:
    projector, entries = inner.multi_modal_projector, int(inner.vision_model.max_num_tiles * inner.vision_model.num_patches)
    states = float32("image_hidden_states", "images", entries, projector.in_features)
    return GraphPlan(
        role="projector",
        module=Single(projector),
        inputs=(states,),
        outputs=(float32("image_features", "images", entries, projector.out_features),),
        cases=tuple(Case(f"{n} image{'s' * (n > 1)}", {"images": n}) for n in (2, 1, 3)),
        sample=lambda case: (randn(states, case),),
        reference=lambda case, tensors: (projector(tensors[0].clone()),),
    )


class _Reading(torch.nn.Module):
    """The model as `decoder_plan` calls it: a cache for the layers that read text, given keys and values for the others."""

    def __init__(self, model: Part, entries: int) -> None:
        super().__init__()
        self.model: Part = model
        self.config = model.config
        text = model.config.get_text_config()
        self.crossing = sorted(int(layer) for layer in text.cross_attention_layers)
        if not self.crossing or 0 in self.crossing:
            raise UnsupportedModelError(
                f"cross_attention_layers is {self.crossing}: at least one layer, and not the first, must read images."
            )
        self.layers, self.entries = int(text.num_hidden_layers), entries
        self.heads = int(text.num_key_value_heads)
        self.head_dim = int(text.hidden_size // text.num_attention_heads)
        self.names = [f"cross_key_values.{i}.{part}" for i in range(len(self.crossing)) for part in ("key", "value")]

    def get_input_embeddings(self) -> torch.nn.Module:
        embedding: torch.nn.Module = self.model.get_input_embeddings()
        return embedding

    def probe(self) -> tuple[KVLayout, int, int]:
        """The KV layout of the layers that read text, hidden size and vocabulary size, from a text without images."""
        cache = DynamicCache()
        with torch.no_grad(), attention_implementation(self.model, "eager"):
            embeddings = self.get_input_embeddings()(torch.zeros(1, 2, dtype=torch.long))
            logits = self.model(inputs_embeds=embeddings.clone(), past_key_values=cache, use_cache=True).logits
        shapes = {tuple(layer.keys.shape) for layer in cache.layers if layer.is_initialized}
        if len(shapes) != 1:
            raise UnsupportedModelError(f"The decoder's layers keep caches of different shapes ({sorted(shapes)}).")
        _, heads, _, width = shapes.pop()
        layout = KVLayout(layers=self.layers - len(self.crossing), kv_heads=heads, head_dim=width)
        return layout, embeddings.shape[-1], logits.shape[-1]

    def static(self, at: int) -> ExtraInput:
        """One of the inputs `cross_key_values.*`."""
        spec = float32(self.names[at], "batch", self.heads, "source", self.head_dim)

        def sample(case: Case) -> torch.Tensor:
            sizes = {**case.sizes, "source": case.sizes["images"] * self.entries}
            shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)
            return torch.randn(shape, generator=case.generator().manual_seed(case.generator().initial_seed() + at + 1))

        @contextmanager
        def enter(model: Part, value: torch.Tensor, arguments: Arguments) -> Iterator[None]:
            arguments.setdefault("static", []).append(value)
            yield

        return ExtraInput(spec, sample, enter, enter)

    def forward(self, static: list[torch.Tensor], past_key_values: Any, **arguments: Any) -> Any:
        own = list(past_key_values.layers)
        if not isinstance(past_key_values, PastCache) and not own:
            own = [DynamicLayer() for _ in range(self.layers - len(self.crossing))]
            past_key_values.layers = own
        text, layers = iter(own), list[Any]()
        for layer in range(self.layers):
            at = self.crossing.index(layer) if layer in self.crossing else None
            layers.append(next(text) if at is None else StaticLayer(at, static[2 * at], static[2 * at + 1]))
        return self.model(past_key_values=Cache(layers=layers), **arguments)

    def keys_and_values(self, encoder_hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """What each cross-attention layer makes of images' vectors `[batch, source, hidden]`."""
        found: list[torch.Tensor] = []
        batch, source, _ = encoder_hidden_states.shape
        for number in self.crossing:
            part = self.model.model.language_model.layers[number].cross_attn
            key, value = (
                projection(encoder_hidden_states).view(batch, source, self.heads, self.head_dim).transpose(1, 2)
                for projection in (part.k_proj, part.v_proj)
            )
            found += [part.k_norm(key), value]
        return found


def _mask_input(tiles: int) -> ExtraInput:
    spec = int64(MASK, "batch", "sequence", "images", tiles)

    def sample(case: Case) -> torch.Tensor:
        """Tokens see the images up to a point, of each as many tiles as its number says; the first sees none at an empty past."""
        batch, tokens, images = (case.sizes[name] for name in ("batch", "sequence", "images"))
        token, image, tile = torch.arange(tokens)[:, None, None], torch.arange(images)[None, :, None], torch.arange(tiles)
        mask = ((token + case.sizes["past"] > image) & (tile <= image)).long()[None].repeat(batch, 1, 1, 1)
        if batch > 2:  # the first row has one image fewer
            mask[0, :, images - 1] = 0
        return mask

    @contextmanager
    def enter(model: Part, value: torch.Tensor, arguments: Arguments) -> Iterator[None]:
        arguments[MASK] = value.to(torch.float32)  # the model subtracts it from 1.0
        yield

    return ExtraInput(spec, sample, enter, enter)


def _real_input(entries: int) -> ExtraInput:
    """`encoder_attention_mask`: which entries are real. Rows with fewer images than others are filled up.

    The model lets a token that sees no image attend to all of them evenly, and the filling must not count among these.
    """
    spec = int64("encoder_attention_mask", "batch", "source")

    def sample(case: Case) -> torch.Tensor:
        images = case.sizes["images"]
        mask = torch.ones(case.sizes["batch"], images * entries, dtype=torch.long)
        if case.sizes["batch"] > 2:
            mask[0, (images - 1) * entries :] = 0
        return mask

    @contextmanager
    def enter(model: Part, value: torch.Tensor, arguments: Arguments) -> Iterator[None]:
        def add(module: torch.nn.Module, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            seen = named[MASK]
            filling = torch.where(value[:, None, None].bool(), torch.zeros(()), torch.full((), torch.finfo(seen.dtype).min))
            return given, {**named, MASK: torch.minimum(seen, filling)}

        handle = model.model.model.language_model.register_forward_pre_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    return ExtraInput(spec, sample, enter, enter)


class _CrossKV(torch.nn.Module):
    def __init__(self, reading: _Reading) -> None:
        super().__init__()
        self.reading = reading

    def forward(self, encoder_hidden_states: torch.Tensor) -> Tensors:
        return tuple(self.reading.keys_and_values(encoder_hidden_states))


def _cross_kv_plan(reading: _Reading) -> GraphPlan:
    graph = _CrossKV(reading)
    states = float32("encoder_hidden_states", "batch", "source", int(reading.config.get_text_config().hidden_size))
    return GraphPlan(
        role="cross_kv",
        module=graph,
        inputs=(states,),
        outputs=tuple(float32(name, "batch", reading.heads, "source", reading.head_dim) for name in reading.names),
        cases=sequence_of_cases(("batch", "source"), ("2 rows", 2, 5), ("1 row", 1, reading.entries), ("3 rows", 3, 9)),
        sample=lambda case: (randn(states, case),),
        reference=lambda case, tensors: graph(tensors[0].clone()),
    )
