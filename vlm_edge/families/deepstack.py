"""The decoder inputs `deepstack.{i}`: visual features that are added to the hidden states after decoder layer i.

DeepStack (arXiv 2406.04334), as Qwen3-VL has it: the vision encoder's earlier layers reach the first decoder layers past the
embeddings. A part of family `projector`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .base import Case, Part, float32
from .decoder import Arguments, Enter, ExtraInput
from .layouts_patches import overridden


def deepstack_inputs(model: Part, taps: Sequence[torch.nn.Module], hidden: int) -> list[ExtraInput]:
    """One per-token input `[batch, sequence, hidden]` for each tap of the vision encoder; zeros where no image is."""
    return [_input(number, hidden) for number in range(len(taps))]


def _input(number: int, hidden: int) -> ExtraInput:
    spec = float32(f"deepstack.{number}", "batch", "sequence", hidden)

    def sample(case: Case) -> torch.Tensor:
        generator = case.generator()
        shown = torch.rand((*case.shape(spec)[:2], 1), generator=generator) < 0.5  # the same tokens for all: one seed
        return torch.randn((number + 1, *case.shape(spec)), generator=generator)[number] * shown

    return ExtraInput(spec, sample, traced=_adding(True), original=_adding(False))


def _adding(plain: bool) -> Enter:
    """Hands the tensor to the text model. `plain`: added to every token; the original picks the image's tokens by a mask."""

    @contextmanager
    def enter(model: Part, value: torch.Tensor, arguments: Arguments) -> Iterator[None]:
        text = model.model.language_model

        def hand_over(module: torch.nn.Module, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            before = named.get("deepstack_visual_embeds") or []
            everywhere = torch.ones(value.shape[:2], dtype=torch.bool)
            mine = value if plain else value[everywhere]
            return given, {**named, "visual_pos_masks": everywhere, "deepstack_visual_embeds": [*before, mine]}

        handle = text.register_forward_pre_hook(hand_over, with_kwargs=True)
        try:
            if plain and "_deepstack_process" not in vars(text):
                with overridden(text, "_deepstack_process", lambda states, mask, features: states + features):
                    yield
            else:
                yield
        finally:
            handle.remove()

    return enter
