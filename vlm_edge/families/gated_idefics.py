"""IDEFICS, the open Flamingo (arXiv 2204.14198): a part of family `gated_cross_attention`.

A perceiver resampler turns each image into a fixed number of latents (Flamingo, section 3.1.1); between the layers of a frozen
language model, gated cross-attention layers read them (section 3.1.2). The keys and values of those layers depend on the images
alone, so graph `cross_kv` computes them once; a token that sees no image gets nothing from them, whatever they hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch

from vlm_edge.export.attention import attention

from .base import Case, GraphPlan, Part, Single, Tensors, float32, int64, randn, sequence_of_cases
from .decoder import Arguments, ExtraInput, decoder_plan, probe
from .gated_parts import MASK, Gated
from .layouts import pixels_of

_IMAGES = 3


def idefics(model: Part, context_length: int) -> Gated:
    """The graphs of an IDEFICS checkpoint."""
    inner = model.model
    latents = _latents(inner)
    vision, resampler = _vision_plan(inner), _resampler_plan(inner)
    width = int((resampler or vision).outputs[0].shape[-1])
    sources = _Sources(inner, latents, width)
    with _one_blind_image(model, latents, width):
        kv, hidden, vocabulary = probe(model)
    graphs = [vision, *([resampler] if resampler else [])]
    extras = [
        _mask_input(),
        _real_input(latents),
        *(sources.static(i, part) for i in range(len(sources.layers)) for part in ("key", "value")),
    ]
    sizes = {"images": _IMAGES, "source": _IMAGES * latents}
    reading = _Reading(model, sources)
    decoder = decoder_plan(reading, kv, hidden, vocabulary, context_length, extras=extras, sizes=sizes)
    return Gated(
        features=tuple(graphs),
        cross_kv=_cross_kv_plan(sources),
        decoder=reading.original(decoder),
        kv=kv,
        hidden=hidden,
        vocabulary=vocabulary,
        source_width=width,
        entries_per_image=latents,
    )


def _latents(inner: Part) -> int:
    """How many vectors the gated layers read of one image."""
    if inner.config.use_resampler:
        return int(inner.perceiver_resampler.n_latents)
    vision = inner.config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2 + 1)


class _Vision(torch.nn.Module):
    def __init__(self, inner: Part) -> None:
        super().__init__()
        self.vision_model: Part = inner.vision_model

    def forward(self, pixel_values: torch.Tensor) -> Tensors:
        return (self.vision_model(pixel_values=pixel_values).last_hidden_state,)


def _vision_plan(inner: Part) -> GraphPlan:
    pixels, graph = pixels_of(inner.config.vision_config, "images"), _Vision(inner)
    vision = inner.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    name = "image_hidden_states" if inner.config.use_resampler else "image_features"
    return GraphPlan(
        role="vision_encoder",
        module=graph,
        inputs=(pixels,),
        outputs=(float32(name, "images", tokens, vision.embed_dim),),
        cases=tuple(Case(f"{n} image{'s' * (n > 1)}", {"images": n}) for n in (2, 1, 3)),
        sample=lambda case: (randn(pixels, case),),
        reference=lambda case, inputs: graph(inputs[0].clone()),
    )


def _resampler_plan(inner: Part) -> GraphPlan | None:
    if not inner.config.use_resampler:
        return None
    vision, resampler = inner.config.vision_config, inner.perceiver_resampler
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    states = float32("image_hidden_states", "images", tokens, vision.embed_dim)
    return GraphPlan(
        role="resampler",
        module=Single(resampler),
        inputs=(states,),
        outputs=(float32("image_features", "images", resampler.n_latents, resampler.embed_dim),),
        cases=tuple(Case(f"{n} image{'s' * (n > 1)}", {"images": n}) for n in (2, 1, 3)),
        sample=lambda case: (randn(states, case),),
        reference=lambda case, inputs: (resampler(inputs[0].clone()),),
    )


class _Sources(torch.nn.Module):
    """Images' vectors `[batch, source, width]` → keys and values `[batch, heads, source, head_dim]` that gated layers read."""

    def __init__(self, inner: Part, latents: int, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(block.cross_attn for block in inner.gated_cross_attn_layers)
        self.latents, self.width = latents, width
        first: Part = self.layers[0]
        self.heads, self.head_dim = int(first.num_heads), int(first.head_dim)

    def forward(self, encoder_hidden_states: torch.Tensor) -> Tensors:
        found: list[torch.Tensor] = []
        batch, source, _ = encoder_hidden_states.shape
        for layer in self.layers:
            part: Part = layer
            key, value = (
                projection(encoder_hidden_states).view(batch, source, self.heads, self.head_dim).transpose(1, 2)
                for projection in (part.k_proj, part.v_proj)
            )
            found += [part.k_layer_norm(key) if part.qk_layer_norms else key, value]
        return tuple(found)

    def vectors(self, case: Case) -> torch.Tensor:
        """The images' vectors of a case: what the original is given, and what the keys and values are made of."""
        shape = (case.sizes["batch"], case.sizes["images"] * self.latents, self.width)
        return torch.randn(shape, generator=case.generator().manual_seed(case.generator().initial_seed() + 1))

    def static(self, layer: int, part: str) -> ExtraInput:
        """The decoder's input with one layer's keys or values."""
        name, at = f"cross_key_values.{layer}.{part}", 2 * layer + (part == "value")
        spec = float32(name, "batch", self.heads, "source", self.head_dim)

        def sample(case: Case) -> torch.Tensor:
            with torch.no_grad():
                return self(self.vectors(case))[at].clone()

        @contextmanager
        def traced(model: Part, value: torch.Tensor, arguments: Arguments) -> Iterator[None]:
            arguments.setdefault("static", {})[name] = value
            yield

        def original(model: Part, value: torch.Tensor, arguments: Arguments) -> AbstractContextManager[Any]:
            return traced(model, value, arguments)

        return ExtraInput(spec, sample, traced, original)


def _mask_input() -> ExtraInput:
    spec = int64(MASK, "batch", "sequence", "images")

    def sample(case: Case) -> torch.Tensor:
        """Each token sees one image, a later one the later it comes; the first sees none, and so does a row's padding."""
        shape = case.shape(spec)
        mask = torch.zeros(shape, dtype=torch.long)
        for row in range(shape[0]):
            for token in range(shape[1]):
                image = token * shape[2] // max(shape[1], 1) if shape[1] > 1 else row % shape[2]
                mask[row, token, image] = int(token > 0 or case.sizes["past"] > 0)
        return mask

    @contextmanager
    def enter(model: Part, value: torch.Tensor, arguments: Arguments) -> Iterator[None]:
        arguments["image_attention_mask"] = value
        yield

    return ExtraInput(spec, sample, enter, enter)


def _real_input(latents: int) -> ExtraInput:
    """`encoder_attention_mask`: which entries are real, where rows have fewer images than others and are filled up.

    No token sees an image that its row does not have, so this changes nothing; it says that filling up does no harm.
    """
    spec = int64("encoder_attention_mask", "batch", "source")

    def sample(case: Case) -> torch.Tensor:
        return torch.ones(case.sizes["batch"], case.sizes["images"] * latents, dtype=torch.long)

    @contextmanager
    def enter(model: Part, value: torch.Tensor, arguments: Arguments) -> Iterator[None]:
        arguments["real"] = value
        yield

    return ExtraInput(spec, sample, enter, enter)


class _Reading(torch.nn.Module):
    """The model as `decoder_plan` calls it: its gated layers read keys and values that are given.

    As the reference (`original`) the model computes them itself, from the vectors that those given were made of.
    """

    def __init__(self, model: Part, sources: _Sources) -> None:
        super().__init__()
        self.model: Part = model
        self.config = model.config
        self._sources = (sources,)
        self._vectors: torch.Tensor | None = None

    def get_input_embeddings(self) -> torch.nn.Module:
        embedding: torch.nn.Module = self.model.get_input_embeddings()
        return embedding

    def original(self, plan: GraphPlan) -> GraphPlan:
        """The plan with the original model as its reference."""

        def reference(case: Case, tensors: Tensors) -> Tensors:
            self._vectors = self._sources[0].vectors(case)
            try:
                return plan.reference(case, tensors)
            finally:
                self._vectors = None

        return replace(plan, reference=reference)

    def forward(
        self, static: dict[str, torch.Tensor], real: torch.Tensor, image_attention_mask: torch.Tensor, **arguments: Any
    ) -> Any:
        sources = self._sources[0]
        shape = (image_attention_mask.shape[0], image_attention_mask.shape[2], sources.latents, sources.width)
        name = "perceiver_embeddings" if self.config.use_resampler else "image_encoder_embeddings"
        if self._vectors is not None:
            return self.model(image_attention_mask=image_attention_mask, **{name: self._vectors.view(shape)}, **arguments)
        with _reading(sources, static, real):
            return self.model(image_attention_mask=image_attention_mask, **{name: torch.zeros(shape)}, **arguments)


@contextmanager
def _reading(sources: _Sources, static: dict[str, torch.Tensor], real: torch.Tensor) -> Iterator[None]:
    """Inside, the gated layers attend to given keys and values instead of projecting images' vectors."""
    filling = torch.where(real[:, None, None].bool(), torch.zeros(()), torch.full((), torch.finfo(torch.float32).min))
    for number, layer in enumerate(sources.layers):
        key, value = (static[f"cross_key_values.{number}.{part}"] for part in ("key", "value"))

        def forward(
            module: Any,
            hidden_states: torch.Tensor,
            key_value_states: torch.Tensor | None = None,
            attention_mask: torch.Tensor | None = None,
            *,
            _key: torch.Tensor = key,
            _value: torch.Tensor = value,
            **rest: Any,
        ) -> tuple[torch.Tensor, None]:
            batch, tokens, _ = hidden_states.shape
            query = module.q_proj(hidden_states).view(batch, tokens, module.num_heads, module.head_dim).transpose(1, 2)
            if module.qk_layer_norms:
                query = module.q_layer_norm(query)
            mask = filling if attention_mask is None else torch.minimum(attention_mask, filling)
            output, _ = attention(module, query, _key, _value, mask, scaling=module.scaling, is_causal=False)
            return module.o_proj(output.reshape(batch, tokens, -1)), None

        setattr(layer, "forward", MethodType(forward, layer))  # noqa: B010 (mypy refuses to assign to a method)
    try:
        yield
    finally:
        for layer in sources.layers:
            delattr(layer, "forward")


def _cross_kv_plan(sources: _Sources) -> GraphPlan:
    states = float32("encoder_hidden_states", "batch", "source", sources.width)
    names = [f"cross_key_values.{i}.{part}" for i in range(len(sources.layers)) for part in ("key", "value")]
    return GraphPlan(
        role="cross_kv",
        module=sources,
        inputs=(states,),
        outputs=tuple(float32(name, "batch", sources.heads, "source", sources.head_dim) for name in names),
        cases=sequence_of_cases(("batch", "source"), ("2 rows", 2, 5), ("1 row", 1, sources.latents), ("3 rows", 3, 9)),
        sample=lambda case: (randn(states, case),),
        reference=lambda case, inputs: sources(inputs[0].clone()),
    )


@contextmanager
def _one_blind_image(model: Part, latents: int, width: int) -> Iterator[None]:
    """Inside, the model can be called without images: it is given one that no token sees."""

    def before(module: torch.nn.Module, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        name = "perceiver_embeddings" if model.config.use_resampler else "image_encoder_embeddings"
        batch, tokens = named["inputs_embeds"].shape[:2]
        more = {name: torch.zeros(batch, 1, latents, width), "image_attention_mask": torch.zeros(batch, tokens, 1)}
        return given, {**named, **more}

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
