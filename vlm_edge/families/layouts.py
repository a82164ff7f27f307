"""How an image enters a vision encoder: as one picture, as tiles, or as a row of patches. A part of family `projector`.

Each layout gives the vision encoder as it is traced (up to the call of the projector) and a way to run the model's own
`get_image_features` on the same images, which is what the trace is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.vision_utils import get_vision_position_ids

from vlm_edge_runtime.bundle.manifest import TensorSpec

from .base import Case, Part, Tensors, float32, int64, randn, run_to


@dataclass(frozen=True, slots=True)
class Layout:
    """The vision encoder to trace, its inputs, and the original to compare it with.

    `features(case, inputs)` runs the model's own `get_image_features` on the images of `inputs`. `rows` is the dimension that
    counts images, tiles or patches. `tokens_dim` names the rows of features where an image has no batch of its own.
    """

    encoder: torch.nn.Module
    inputs: tuple[TensorSpec, ...]
    sample: Callable[[Case], Tensors]
    features: Callable[[Case, Tensors], object]
    cases: tuple[Case, ...]
    rows: str
    tokens_dim: str | None = None


class _WholeImage(torch.nn.Module):
    """`pixel_values [images, channels, height, width]` → what the model's projector is called with."""

    def __init__(self, model: Part, projector: torch.nn.Module) -> None:
        super().__init__()
        self.model: Part = model
        self._projector = (projector,)  # in a tuple: it is not a part of this graph

    def forward(self, pixel_values: torch.Tensor) -> Tensors:
        return (run_to(self.model, self._projector[0], lambda: self.model.get_image_features(pixel_values=pixel_values)),)


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


class _OneSegment:
    """Stands for `cu_seqlens` while tracing: all patches are one image, which attends to itself as a whole.

    The original cuts the patches at boundaries read from a tensor, which no trace can follow. With one image per call there is
    one segment, as long as the row of patches; this object answers the three questions the original asks of the boundaries.
    """

    def __init__(self, patches: int) -> None:
        self._patches = patches

    def __getitem__(self, index: slice) -> _OneSegment:
        return self

    def __sub__(self, other: object) -> _OneSegment:
        return self

    def tolist(self) -> list[int]:
        return [self._patches]


class _PatchRow(torch.nn.Module):
    """`pixel_values [patches, values]`, `position_ids [patches, 2]` → hidden states `[patches, vision_hidden]` of one image."""

    def __init__(self, vision: Part, projector: torch.nn.Module) -> None:
        super().__init__()
        self.vision: Part = vision
        self._projector = (projector,)

    def forward(self, pixel_values: torch.Tensor, position_ids: torch.Tensor) -> Tensors:
        def call() -> object:
            segment = _OneSegment(pixel_values.shape[0])
            return self.vision.forward(pixel_values, grid_thw=None, position_ids=position_ids, cu_seqlens=segment, max_seqlen=0)

        return (run_to(self.vision, self._projector[0], call),)


def patch_layout(model: Part, vision: Part, projector: torch.nn.Module) -> Layout:
    """Qwen2-VL: one image per call, of any size; its patches come in blocks of merge × merge (the processor's order)."""
    config = model.config.vision_config
    merge = int(config.spatial_merge_size)
    values = int(config.in_channels) * int(config.temporal_patch_size) * int(config.patch_size) ** 2
    pixels, positions = float32("pixel_values", "patches", values), int64("position_ids", "patches", 2)

    def grid(case: Case) -> torch.Tensor:
        return torch.tensor([[1, case.sizes["height"], case.sizes["width"]]])

    def sample(case: Case) -> Tensors:
        return randn(pixels, case), get_vision_position_ids(grid(case), merge)

    def case(rows: int, columns: int) -> Case:
        height, width = rows * merge, columns * merge
        sizes = {"patches": height * width, "tokens": rows * columns, "height": height, "width": width}
        return Case(f"one image of {height} × {width} patches", sizes)

    return Layout(
        encoder=_PatchRow(vision, projector),
        inputs=(pixels, positions),
        sample=sample,
        features=lambda case, inputs: model.get_image_features(inputs[0].clone(), grid(case)),
        cases=(case(2, 3), case(1, 1), case(5, 2), case(4, 7)),
        rows="patches",
        tokens_dim="tokens",
    )


LAYOUTS: dict[str, Callable[[Part, Part, torch.nn.Module], Layout]] = {
    "image": image_layout,
    "crops": image_layout,
    "tiles": tile_layout,
    "patches": patch_layout,
}


def pixels_of(vision_config: Any, rows: str) -> TensorSpec:
    """`pixel_values` of a vision configuration's image size; `rows` names the dynamic first dimension."""
    size = vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return float32("pixel_values", rows, int(getattr(vision_config, "num_channels", 3)), int(height), int(width))
