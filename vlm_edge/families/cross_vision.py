"""The vision side of family `cross_attention`: images, or rows of patches, to the features that are read or merged.

Not a family. The vision encoder is run as it is; a linear map after it, where the checkpoint has one, is the graph `projector`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vlm_edge.export.attention import attention_implementation
from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge_runtime.bundle.manifest import TensorSpec
from vlm_edge_runtime.errors import UnsupportedModelError

from .base import Case, GraphPlan, Part, Single, Tensors, float32, randn


@dataclass(frozen=True, slots=True)
class View:
    """How an image enters: the graph's module and inputs, and the cases in which it is checked; the first size of each counts

    images or patches. `batched`: the rows are images; else they are the patches of one.
    """

    module: torch.nn.Module
    inputs: tuple[TensorSpec, ...]
    sample: Callable[[Case], Tensors]
    cases: tuple[Case, ...]
    batched: bool


@dataclass(frozen=True, slots=True)
class Vision:
    """The graphs in order, the last one's output, its width, and the tokens of an image (0: depends on the image)."""

    plans: tuple[GraphPlan, ...]
    features: TensorSpec
    width: int
    tokens: int


class _Images(torch.nn.Module):
    """`pixel_values [images, channels, height, width]` → the encoder's last hidden states."""

    def __init__(self, vision: Part) -> None:
        super().__init__()
        self.vision: Part = vision

    def forward(self, pixel_values: torch.Tensor) -> Tensors:
        return (self.vision(pixel_values, return_dict=True).last_hidden_state,)


def whole(checkpoint: Checkpoint, vision: Part) -> View:
    """Every image has the size that the image processor gives it."""
    height, width = _size(checkpoint.image_processor, vision.config)
    pixels = float32("pixel_values", "images", _channels(vision.config), height, width)
    return View(
        module=_Images(vision),
        inputs=(pixels,),
        sample=lambda case: (randn(pixels, case),),
        cases=tuple(Case(f"{n} image{'s' * (n > 1)}", {"images": n}) for n in (2, 1, 3)),
        batched=True,
    )


class _Patches(torch.nn.Module):
    """`flattened_patches [patches, 2 + values]` of one image, row and column in front → hidden states `[patches, width]`."""

    def __init__(self, vision: Part) -> None:
        super().__init__()
        self.vision: Part = vision

    def forward(self, flattened_patches: torch.Tensor) -> Tensors:
        mask = torch.ones(1, flattened_patches.shape[0])  # no patch is padding: an image brings only its own
        output = self.vision(flattened_patches=flattened_patches[None], attention_mask=mask, return_dict=True)
        return (output.last_hidden_state[0],)


def patches(checkpoint: Checkpoint, vision: Part) -> View:
    """Pix2Struct (arXiv 2210.03347, section 2.1): as many patches of one size as fit, in the image's own aspect ratio."""
    spec = float32("flattened_patches", "patches", 2 + int(vision.config.patch_embed_hidden_size))

    def sample(case: Case) -> Tensors:
        rows, columns = case.sizes["rows"], case.sizes["columns"]
        values = randn(spec, case)
        values[:, 0] = torch.arange(rows).repeat_interleave(columns) + 1
        values[:, 1] = torch.arange(columns).repeat(rows) + 1
        return (values,)

    shapes = ((2, 3), (1, 1), (5, 2), (4, 7))
    return View(
        module=_Patches(vision),
        inputs=(spec,),
        sample=sample,
        cases=tuple(
            Case(f"one image of {rows} × {columns} patches", {"patches": rows * columns, "rows": rows, "columns": columns})
            for rows, columns in shapes
        ),
        batched=False,
    )


VISIONS: dict[str, Callable[[Checkpoint, Part], View]] = {"whole": whole, "patches": patches}


def vision_plans(checkpoint: Checkpoint, view: Callable[[Checkpoint, Part], View], vision: Part, mapped: Part | None) -> Vision:
    """`vision_encoder`, and `projector` where `mapped` is a part that takes its features to another width."""
    seen = view(checkpoint, vision)
    model = checkpoint.model

    def original(case: Case, inputs: Tensors) -> Tensors:
        return seen.module(*(tensor.clone() for tensor in inputs))

    def hidden_states(case: Case) -> Tensors:
        with torch.no_grad(), attention_implementation(model, "eager"):
            return original(case, seen.sample(case))

    hidden = hidden_states(seen.cases[0])[0]
    rows = next(iter(seen.cases[0].sizes))
    name = "image_features" if mapped is None else "image_hidden_states"
    spec = float32(name, rows, *hidden.shape[1:])
    plans = [GraphPlan("vision_encoder", seen.module, seen.inputs, (spec,), seen.cases, seen.sample, original)]
    if mapped is not None:
        with torch.no_grad():
            features = mapped(hidden)
        out = float32("image_features", rows, *features.shape[1:])
        reference = lambda case, inputs: (mapped(inputs[0].clone()),)  # noqa: E731
        plans.append(GraphPlan("projector", Single(mapped), (spec,), (out,), seen.cases, hidden_states, reference))
        spec, hidden = out, features
    if hidden.dim() != (3 if seen.batched else 2):
        raise UnsupportedModelError(
            f"The vision encoder '{vision.config.model_type}' gives features of shape {list(hidden.shape)}; a sequence of "
            "vectors per image is expected: only encoders that end in one can be read by cross-attention."
        )
    return Vision(tuple(plans), spec, int(hidden.shape[-1]), int(hidden.shape[1]) if seen.batched else 0)


def _size(processor: dict[str, Any], config: Any) -> tuple[int, int]:
    """Height and width of what the image processor puts out; else the encoder's own image size."""
    keys = [key for key, used in (("crop_size", "do_center_crop"), ("size", "do_resize")) if processor.get(used)]
    for key in keys:
        size = processor.get(key)
        if isinstance(size, dict) and size.get("height") and size.get("width"):
            return int(size["height"]), int(size["width"])
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise UnsupportedModelError(
        f"Neither the image processor nor the vision encoder '{config.model_type}' says to what height and width images come: "
        "set size in preprocessor_config.json."
    )


def _channels(config: Any) -> int:
    for name in ("num_channels", "in_channels", "in_chans"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    return 3
