"""Images of any size as one row of patches: Qwen's vision encoders and Pixtral's. A part of family `projector`.

Positions, windows and the order of patches depend on the image's size; the host computes them (bundle/vision_layout.py) and the
graphs read them. Here they are made by transformers' own functions, so that the check compares with those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from vlm_edge_runtime.bundle.manifest import TensorSpec
from vlm_edge_runtime.bundle.vision_layout import Geometry, InterpolationGeometry, MergeGeometry, WindowGeometry

from .base import Case, Part, Tensors, float32, int64, randn, run_to
from .layouts import Layout


class OneSegment:
    """Stands for `cu_seqlens` while tracing: all patches are one image, which attends to itself as a whole.

    The original cuts the patches at boundaries read from a tensor, which no trace can follow. With one image per call there is
    one segment, as long as the row of patches; this object answers the three questions the original asks of the boundaries.
    """

    def __init__(self, patches: int) -> None:
        self._patches = patches

    def __getitem__(self, index: slice) -> OneSegment:
        return self

    def __sub__(self, other: object) -> OneSegment:
        return self

    def tolist(self) -> list[int]:
        return [self._patches]


@contextmanager
def overridden(module: torch.nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A method of one module is another function for a while."""
    object.__setattr__(module, name, function)
    try:
        yield
    finally:
        object.__delattr__(module, name)


@contextmanager
def listening(root: torch.nn.Module, parts: tuple[torch.nn.Module, ...]) -> Iterator[list[torch.Tensor]]:
    """Collects what each part would have been called with; the parts are not run and give back their input."""
    heard: list[torch.Tensor] = []
    places = [
        (module, name, child)
        for module in root.modules()
        for name, child in module.named_children()
        if any(child is one for one in parts)
    ]

    def hear(tensor: torch.Tensor) -> torch.Tensor:
        heard.append(tensor)
        return tensor

    try:
        for module, name, _ in places:
            module._modules[name] = hear  # type: ignore[assignment]
        yield heard
    finally:
        for module, name, child in places:
            module._modules[name] = child


@contextmanager
def windows(attentions: Sequence[torch.nn.Module], ids: torch.Tensor) -> Iterator[None]:
    """Lets patches with one of `ids` int64 `[patches]` see each other, and no others, in these attentions."""
    seen = ids[:, None] == ids[None, :]
    bias = torch.where(seen, torch.zeros(()), torch.full((), torch.finfo(torch.float32).min))[None, None]

    def hand_over(module: torch.nn.Module, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return given, {**named, "position_bias": bias}

    handles = [attention.register_forward_pre_hook(hand_over, with_kwargs=True) for attention in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _PatchRow(torch.nn.Module):
    """The vision encoder of one image up to its merger: `pixel_values [patches, values]`, `position_ids [patches, 2]` and what

    else depends on the image → hidden states `[patches, vision_hidden]`, and those that each of `taps` reads.
    """

    def __init__(
        self, vision: Part, projector: torch.nn.Module, names: tuple[str, ...], taps: tuple[torch.nn.Module, ...]
    ) -> None:
        super().__init__()
        self.vision: Part = vision
        self._projector = (projector,)
        self._names = names
        self._taps = taps

    def forward(self, pixel_values: torch.Tensor, *places: torch.Tensor) -> Tensors:
        given = dict(zip(self._names, places, strict=True))
        segment = OneSegment(pixel_values.shape[0])
        arguments: dict[str, Any] = {"position_ids": given["position_ids"], "cu_seqlens": segment, "max_seqlen": 0}
        if "interpolation_indices" in given:
            arguments |= {"interp_indices": given["interpolation_indices"], "interp_weights": given["interpolation_weights"]}
        with ExitStack() as stack:
            if "patch_order" in given:
                order, ids = given["patch_order"], given["window_ids"]
                # The original puts blocks of merge² patches in order by `window_index`; here the rows are.
                stack.enter_context(overridden(self.vision, "permute_input_for_window_attn", lambda rows, *_, **__: rows[order]))
                arguments |= {"window_index": order, "cu_window_seqlens": segment, "max_window_seqlen": 0}
                full = set(self.vision.fullatt_block_indexes)
                inside = [block.attn for number, block in enumerate(self.vision.blocks) if number not in full]
                stack.enter_context(windows(inside, ids))
            heard = stack.enter_context(listening(self.vision, self._taps))
            call = partial(self.vision.forward, pixel_values, grid_thw=None, **arguments)
            return (run_to(self.vision, self._projector[0], call), *heard)


class _Merger(torch.nn.Module):
    """The merger, and one for each tap; `token_order [tokens]`, where patches are ordered by windows, puts tokens back."""

    def __init__(self, projector: torch.nn.Module, taps: tuple[torch.nn.Module, ...]) -> None:
        super().__init__()
        self.projector = projector
        self.taps = torch.nn.ModuleList(taps)

    def forward(self, hidden: torch.Tensor, *rest: torch.Tensor) -> Tensors:
        further = rest[: len(self.taps)]
        features = (self.projector(hidden), *(tap(tensor) for tap, tensor in zip(self.taps, further, strict=True)))
        order = rest[len(self.taps) :]
        return tuple(each[order[0]] for each in features) if order else features


def patch_layout(model: Part, vision: Part, projector: torch.nn.Module) -> Layout:
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: one image per call; its patches come in blocks of merge × merge (the processor's order).

    What an encoder has decides: windows (Qwen2.5-VL), a square of learned positions, mergers on the way (Qwen3-VL).
    """
    config = model.config.vision_config
    merge = int(config.spatial_merge_size)
    values = int(getattr(config, "in_channels", 3)) * int(config.temporal_patch_size) * int(config.patch_size) ** 2
    pixels = float32("pixel_values", "patches", values)
    specs = [int64("position_ids", "patches", 2)]
    makers: list[Callable[[torch.Tensor], Tensors]] = [lambda grid: (get_vision_position_ids(grid, merge),)]
    geometry: list[Geometry] = []
    side = getattr(vision, "num_grid_per_side", None)
    if side is not None:
        corners = bool(vision.interpolation_align_corners)
        specs += [int64("interpolation_indices", "patches", 4), float32("interpolation_weights", "patches", 4)]
        makers.append(
            lambda grid: get_vision_interpolation_indices_and_weights(
                grid, side, mode="bilinear", align_corners=corners, spatial_merge_size=merge
            )
        )
        geometry.append(InterpolationGeometry(merge=merge, side=int(side), align_corners=corners))
    windowed = hasattr(vision, "fullatt_block_indexes")
    if windowed:
        specs += [int64("patch_order", "patches"), int64("window_ids", "patches")]
        makers.append(lambda grid: _windows(grid, config)[:2])
        geometry.append(WindowGeometry(merge=merge, window=int(config.window_size) // merge // int(config.patch_size)))
    taps = tuple(getattr(vision, "deepstack_merger_list", ()))

    def grid(case: Case) -> torch.Tensor:
        return torch.tensor([[1, case.sizes["height"], case.sizes["width"]]])

    def sample(case: Case) -> Tensors:
        return (randn(pixels, case), *(tensor for make in makers for tensor in make(grid(case))))

    def arranged(case: Case, outputs: Tensors) -> Tensors:
        return tuple(each[_windows(grid(case), config)[2]] for each in outputs) if windowed else outputs

    return Layout(
        encoder=_PatchRow(vision, projector, tuple(spec.name for spec in specs), taps),
        inputs=(pixels, *specs),
        sample=sample,
        features=lambda case, inputs: model.get_image_features(inputs[0].clone(), grid(case)),
        cases=tuple(_case(rows * merge, columns * merge, merge) for rows, columns in ((2, 3), (1, 1), (5, 2), (4, 7))),
        rows="patches",
        tokens_dim="tokens",
        mapped=_Merger(projector, taps),
        further=(int64("token_order", "tokens"),) if windowed else (),
        places=lambda case: (_windows(grid(case), config)[2],) if windowed else (),
        arranged=arranged,
        taps=taps,
        geometry=tuple(geometry),
    )


def _case(height: int, width: int, merge: int) -> Case:
    sizes = {"patches": height * width, "tokens": height * width // merge**2, "height": height, "width": width}
    return Case(f"one image of {height} × {width} patches", sizes)


def _windows(grid: torch.Tensor, config: Any) -> Tensors:
    """The order of patches, the number of each one's window, and the place of each token, from the original's own function."""
    merge = int(config.spatial_merge_size)
    index, bounds = get_vision_window_index(
        grid, spatial_merge_size=merge, window_size=int(config.window_size), patch_size=int(config.patch_size)
    )
    order = (index[:, None] * merge**2 + torch.arange(merge**2)).reshape(-1)
    ids = torch.repeat_interleave(torch.arange(len(bounds) - 1), (bounds[1:] - bounds[:-1]).long())
    return order, ids, torch.argsort(index)


class _PatchedImage(torch.nn.Module):
    """Pixtral: `pixel_values [patches, channels · patch · patch]`, `position_ids [patches, 2]` → `[patches, vision_hidden]`.

    The original convolves a whole image with a stride of one patch, which is the same product for each patch.
    """

    def __init__(self, model: Part, vision: Part, projector: torch.nn.Module) -> None:
        super().__init__()
        self.model: Part = model
        self._vision = (vision,)
        self._projector = (projector,)

    def forward(self, pixel_values: torch.Tensor, position_ids: torch.Tensor) -> Tensors:
        vision, size = self._vision[0], self._vision[0].patch_size

        def encode(self: Part, pixel_values: torch.Tensor, image_sizes: Any = None, **kwargs: Any) -> BaseModelOutput:
            patches = self.patch_conv(pixel_values.reshape(pixel_values.shape[0], -1, size, size)).flatten(1)
            hidden = self.ln_pre(patches[None])
            rotary = self.patch_positional_embedding(hidden, position_ids)
            found: BaseModelOutput = self.transformer(hidden, attention_mask=None, position_embeddings=rotary, **kwargs)
            return found

        # What it is wrapped in lets callers ask for hidden states of its layers.
        wrapped = merge_with_config_defaults(capture_outputs(encode))
        with overridden(vision, "forward", MethodType(wrapped, vision)):
            call = partial(self.model.get_image_features, pixel_values=pixel_values, image_sizes=[(size, size)])
            hidden = run_to(self.model, self._projector[0], call)
        return (hidden.reshape(-1, hidden.shape[-1]),)


class _PatchMerger(torch.nn.Module):
    """Mistral 3's projector: its merger reads `merge_index [tokens, merge²]` where the original unfolds a grid of patches."""

    def __init__(self, projector: Part) -> None:
        super().__init__()
        self.projector: Part = projector

    def forward(self, hidden: torch.Tensor, merge_index: torch.Tensor) -> Tensors:
        merger = self.projector.patch_merger

        def merge(features: torch.Tensor, image_sizes: object) -> torch.Tensor:
            squares = features[merge_index]  # [tokens, merge², vision_hidden]; unfold puts channels first
            merged: torch.Tensor = merger.merging_layer(squares.transpose(1, 2).flatten(1))
            return merged

        with overridden(merger, "forward", merge):
            return (self.projector(hidden, None),)


def patch_rows_layout(model: Part, vision: Part, projector: torch.nn.Module) -> Layout:
    """Pixtral and Mistral 3: one image per call, its patches in reading order, each with its row and column."""
    config = model.config.vision_config
    size, merge = int(config.patch_size), int(getattr(model.config, "spatial_merge_size", 1))
    merged = hasattr(projector, "patch_merger")
    pixels = float32("pixel_values", "patches", int(config.num_channels) * size**2)
    positions: TensorSpec = int64("position_ids", "patches", 2)

    def sample(case: Case) -> Tensors:
        grid = torch.tensor([[1, case.sizes["height"], case.sizes["width"]]])
        return randn(pixels, case), get_vision_position_ids(grid, 1)

    def features(case: Case, inputs: Tensors) -> object:
        height, width = case.sizes["height"], case.sizes["width"]
        image = inputs[0].reshape(height, width, -1, size, size).permute(2, 0, 3, 1, 4)
        image = image.reshape(1, -1, height * size, width * size)
        return model.get_image_features(pixel_values=image, image_sizes=[(height * size, width * size)])

    def places(case: Case) -> Tensors:
        height, width = case.sizes["height"], case.sizes["width"]
        rows = torch.arange(height * width, dtype=torch.float32).reshape(1, 1, height, width)
        return (torch.nn.functional.unfold(rows, merge, stride=merge)[0].t().long(),)

    return Layout(
        encoder=_PatchedImage(model, vision, projector),
        inputs=(pixels, positions),
        sample=sample,
        features=features,
        cases=tuple(_case(rows * merge, columns * merge, merge) for rows, columns in ((2, 3), (1, 1), (5, 2), (4, 7))),
        rows="patches",
        tokens_dim="tokens" if merged else "patches",
        mapped=_PatchMerger(projector) if merged else None,
        further=(int64("merge_index", "tokens", merge**2),) if merged else (),
        places=places if merged else (lambda case: ()),
        geometry=(MergeGeometry(merge=merge),) if merged else (),
    )
