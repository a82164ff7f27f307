"""How an image enters a vision encoder: as one picture or as tiles (patches: layouts_patches). A part of family `projector`.

Each layout gives the vision encoder as it is traced (up to the call of the projector) and a way to run the model's own
`get_image_features` on the same images, which is what the trace is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlm_edge_runtime.bundle.manifest import TensorSpec
from vlm_edge_runtime.bundle.vision_layout import Geometry

from .base import Case, Part, Tensors, float32, randn, run_to


def no_tensors(case: Case) -> Tensors:
    """The default of `Layout.places`: the projector reads nothing else."""
    return ()


def as_they_are(case: Case, outputs: Tensors) -> Tensors:
    """The default of `Layout.arranged`."""
    return outputs


@dataclass(frozen=True, slots=True)
class Layout:
    """The vision encoder to trace, its inputs, and the original to compare it with.

    `features(case, inputs)` runs the model's own `get_image_features` on the images of `inputs`. `rows` is the dimension that
    counts images, tiles or patches. `tokens_dim` names the rows of features where an image has no batch of its own.

    Where the graph `projector` is more than the projector: `mapped` is its module, `further` names inputs of its own and
    `places(case)` makes them, and `arranged(case, outputs)` does to the original's projector outputs what the graph does with
    them. `taps`: parts that read hidden states on the way; each has one further output of the encoder and of `mapped`.
    `geometry`: the arrays that the host makes.
    """

    encoder: torch.nn.Module
    inputs: tuple[TensorSpec, ...]
    sample: Callable[[Case], Tensors]
    features: Callable[[Case, Tensors], object]
    cases: tuple[Case, ...]
    rows: str
    tokens_dim: str | None = None
    mapped: torch.nn.Module | None = None
    further: tuple[TensorSpec, ...] = ()
    places: Callable[[Case], Tensors] = no_tensors
    arranged: Callable[[Case, Tensors], Tensors] = as_they_are
    taps: tuple[torch.nn.Module, ...] = ()
    geometry: tuple[Geometry, ...] = ()


class _WholeImage(torch.nn.Module):
    """`pixel_values [images, channels, height, width]` → what the model's projector is called with."""

    def __init__(self, model: Part, projector: torch.nn.Module, **fixed: Any) -> None:
        super().__init__()
        self.model: Part = model
        self._projector = (projector,)  # in a tuple: it is not a part of this graph
        self._fixed = fixed

    def forward(self, pixel_values: torch.Tensor) -> Tensors:
        def call() -> object:
            return self.model.get_image_features(pixel_values=pixel_values, **self._fixed)

        return (run_to(self.model, self._projector[0], call),)


def image_layout(model: Part, vision: Part, projector: torch.nn.Module) -> Layout:
    """LLaVA: every image has the vision encoder's size."""
    pixels = pixels_of(getattr(model.config, "vision_config", model.config), "images")
    return Layout(
        encoder=_WholeImage(model, projector),
        inputs=(pixels,),
        sample=lambda case: (randn(pixels, case),),
        features=lambda case, inputs: model.get_image_features(pixel_values=inputs[0].clone()),
        cases=tuple(Case(f"{n} image{'s' * (n > 1)}", {"images": n}) for n in (2, 1, 3)),
        rows="images",
    )


def framed_layout(model: Part, vision: Part, projector: torch.nn.Module) -> Layout:
    """InternVL: every tile has the vision encoder's size; the whole image is one more tile."""
    return replace_rows(image_layout(model, vision, projector), "tiles")


def replace_rows(layout: Layout, rows: str) -> Layout:
    """The same layout with another name for the first dimension."""
    inputs = tuple(TensorSpec(name=spec.name, dtype=spec.dtype, shape=(rows, *spec.shape[1:])) for spec in layout.inputs)
    cases = tuple(
        Case(f"{n} {rows[: None if n > 1 else -1]}", {rows: n}) for n in (case.sizes[layout.rows] for case in layout.cases)
    )
    return replace(layout, inputs=inputs, cases=cases, rows=rows, sample=lambda case: (randn(inputs[0], case),))


class _TileAndNewline(torch.nn.Module):
    """`[tiles, tokens, vision_hidden]` → `[tiles, tokens + 1, hidden]`: a learned end of a line after each tile's."""

    def __init__(self, projector: torch.nn.Module, newline: torch.Tensor) -> None:
        super().__init__()
        self.projector = projector
        self.newline = newline

    def forward(self, hidden: torch.Tensor) -> Tensors:
        return (with_newline(self.projector(hidden), self.newline),)


def with_newline(features: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """One more row for each tile."""
    return torch.cat([features, newline.to(features.dtype).expand(features.shape[0], 1, -1)], dim=1)


def any_resolution_layout(model: Part, vision: Part, projector: torch.nn.Module) -> Layout:
    """LLaVA-NeXT and LLaVA-OneVision: the whole image and its tiles; the host puts their features together.

    The original also splits and packs the features by image, which comes after the projector and needs no graph.
    """
    whole = replace_rows(image_layout(model, vision, projector), "tiles")
    newline = (model.model if hasattr(model, "model") else model).image_newline
    size = [(model.config.vision_config.image_size,) * 2]

    def features(case: Case, inputs: Tensors) -> object:
        return model.get_image_features(pixel_values=inputs[0].clone(), image_sizes=size)

    return replace(
        whole,
        encoder=_WholeImage(model, projector, image_sizes=size),
        features=features,
        mapped=_TileAndNewline(projector, newline),
        arranged=lambda case, outputs: (with_newline(outputs[0], newline),),
    )


class _FullTile(torch.nn.Module):
    """`pixel_values [tiles, channels, height, width]` → the encoder's last hidden states; every tile is full.

    The original derives the position of each patch from a mask of which patches are real, with data-dependent shapes. All tiles
    of an image are full (an image is resized to a multiple of the tile), so the positions are those of one full tile, and
    no patch needs masking.
    """

    def __init__(self, vision: Part) -> None:
        super().__init__()
        self.vision: Part = vision
        seen: list[torch.Tensor] = []
        handle = vision.embeddings.position_embedding.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        size, channels = vision.config.image_size, vision.config.num_channels
        try:
            with torch.no_grad():
                vision(pixel_values=torch.zeros(1, channels, size, size))
        finally:
            handle.remove()
        self.register_buffer("positions", seen[0].to(torch.long), persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> Tensors:
        embeddings = self.vision.embeddings
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        hidden = patches + embeddings.position_embedding(self.positions)
        encoded = self.vision.encoder(inputs_embeds=hidden, attention_mask=None)
        return (self.vision.post_layernorm(encoded.last_hidden_state),)


def tile_layout(model: Part, vision: Part, projector: torch.nn.Module) -> Layout:
    """Idefics3 and SmolVLM: the rows of a batch are tiles."""
    pixels = pixels_of(model.config.vision_config, "tiles")
    return Layout(
        encoder=_FullTile(vision),
        inputs=(pixels,),
        sample=lambda case: (randn(pixels, case),),
        features=lambda case, inputs: model.get_image_features(pixel_values=inputs[0].clone()[None]),
        cases=tuple(Case(f"{n} tile{'s' * (n > 1)}", {"tiles": n}) for n in (2, 1, 3)),
        rows="tiles",
    )


def pixels_of(vision_config: Any, rows: str) -> TensorSpec:
    """`pixel_values` of a vision configuration's image size; `rows` names the dynamic first dimension."""
    size = vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return float32("pixel_values", rows, int(getattr(vision_config, "num_channels", 3)), int(height), int(width))
