"""The graphs `vision_encoder` and `projector`, cut at the call of the model's projector. A part of family `projector`."""

from __future__ import annotations

import math

import torch

from vlm_edge.export.attention import attention_implementation

from .base import Case, GraphPlan, Part, Seam, Single, Tensors, float32
from .layouts import Layout


def vision_plans(model: Part, projector: torch.nn.Module, layout: Layout) -> tuple[GraphPlan, GraphPlan, int]:
    """Both graphs, and how many tokens one image or tile becomes (0: depends on the image)."""
    seen: dict[str, tuple[Tensors, Tensors]] = {}
    flat = layout.tokens_dim is not None

    def original(case: Case, inputs: Tensors) -> tuple[Tensors, Tensors]:
        """What went into the original's projector (and taps) and what came out, while it encoded these images."""
        parts = (projector, *layout.taps)
        kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(module: torch.nn.Module, given: Tensors, result: torch.Tensor) -> None:
            kept[id(module)] = tuple(each.detach().clone() for each in (given[0], result))  # type: ignore[assignment]
            if len(kept) == len(parts):
                raise Seam(result)  # what follows puts images together, which the host does

        handles = [part.register_forward_hook(keep) for part in parts]
        try:
            layout.features(case, inputs)
        except Seam:
            pass
        finally:
            for handle in handles:
                handle.remove()
        hidden, features = (tuple(kept[id(part)][which] for part in parts) for which in (0, 1))
        if flat:
            hidden = tuple(each.reshape(-1, each.shape[-1]) for each in hidden)
            features = tuple(each.reshape(-1, each.shape[-1]) for each in features)
        seen[case.label] = hidden, layout.arranged(case, features)
        return seen[case.label]

    def outcome(case: Case) -> tuple[Tensors, Tensors]:
        """What the vision encoder really puts out, not noise; kept from its own check, for it may cost seconds a tile."""
        if case.label not in seen:
            with torch.no_grad(), attention_implementation(model, "eager"):
                original(case, layout.sample(case))
        return seen[case.label]

    hidden, features = outcome(layout.cases[0])
    names = [f"deepstack.{number}" for number in range(len(layout.taps))]
    rows_in = (layout.rows,) if flat else (layout.rows, *hidden[0].shape[1:-1])
    rows_out = (layout.tokens_dim,) if layout.tokens_dim else (layout.rows, *features[0].shape[1:-1])
    hidden_specs = tuple(
        float32(name, *rows_in, each.shape[-1])
        for name, each in zip(["image_hidden_states", *(f"{name}.hidden_states" for name in names)], hidden, strict=True)
    )
    features_specs = tuple(
        float32(name, *rows_out, each.shape[-1]) for name, each in zip(["image_features", *names], features, strict=True)
    )
    vision = GraphPlan(
        role="vision_encoder",
        module=layout.encoder,
        inputs=layout.inputs,
        outputs=hidden_specs,
        cases=layout.cases,
        sample=layout.sample,
        reference=lambda case, inputs: original(case, inputs)[0],
    )
    mapped = GraphPlan(
        role="projector",
        module=layout.mapped if layout.mapped is not None else Single(projector),
        inputs=(*hidden_specs, *layout.further),
        outputs=features_specs,
        cases=layout.cases,
        sample=lambda case: (*outcome(case)[0], *layout.places(case)),
        reference=lambda case, inputs: outcome(case)[1],
    )
    return vision, mapped, 0 if flat else math.prod(features[0].shape[1:-1])
