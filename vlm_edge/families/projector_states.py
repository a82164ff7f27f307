"""State vectors as tokens and actions as answers (PaLM-E, arXiv 2303.03378; RT-2, 2307.15818). A part of family `projector`."""

from __future__ import annotations

from typing import Any

import torch

from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge_runtime.bundle.manifest import ActionTokens, FixedPlaceholder, Modality
from vlm_edge_runtime.errors import UnsupportedModelError

from .base import GraphPlan, Single, Tensors, float32, randn, sequence_of_cases


def state_modality(checkpoint: Checkpoint, encoder: torch.nn.Module) -> tuple[Modality, GraphPlan]:
    """The modality of states and its graph `state_encoder`: `states [states, S]` → `state_features [states, hidden]`."""
    config: Any = checkpoint.config
    token = checkpoint.tokenizer.convert_ids_to_tokens(config.state_token_id)
    if token is None:
        raise UnsupportedModelError(
            f"The tokenizer has no token {config.state_token_id}, which the configuration calls its state."
        )
    cases = sequence_of_cases(("states",), ("2 states", 2), ("1 state", 1), ("5 states", 5))
    states = float32("states", "states", int(config.state_size))
    with torch.no_grad():
        width = encoder(torch.zeros(1, int(config.state_size))).shape[-1]

    def reference(case: object, inputs: Tensors) -> Tensors:
        return (encoder(inputs[0].clone()),)

    plan = GraphPlan(
        role="state_encoder",
        module=Single(encoder),
        inputs=(states,),
        outputs=(float32("state_features", "states", width),),
        cases=cases,
        sample=lambda case: (randn(states, case),),
        reference=reference,
    )
    modality = Modality(
        kind="state",
        graphs=[plan.role],
        batch="image",
        token_id=int(config.state_token_id),
        placeholder=FixedPlaceholder(image_token=token, tokens_per_image=1),
    )
    return modality, plan


def action_tokens(checkpoint: Checkpoint) -> ActionTokens | None:
    """How the answer's tokens stand for actions, where the configuration says (`action_tokens`).

    Raises UnsupportedModelError where its numbers do not fit together.
    """
    given = getattr(checkpoint.config, "action_tokens", None)
    if given is None:
        return None
    found = ActionTokens(
        first_token=int(given["first_token"]),
        bins=int(given["bins"]),
        low=[float(bound) for bound in given["low"]],
        high=[float(bound) for bound in given["high"]],
    )
    bounds = list(zip(found.low, found.high, strict=False))
    if len(found.low) != len(found.high) or not bounds or any(low >= high for low, high in bounds) or found.bins < 1:
        raise UnsupportedModelError(
            f"action_tokens of the configuration ({given}) must give as many upper as lower bounds, all above them, and bins."
        )
    return found
