"""The training loops: next-token loss for LLaVA and SmolVLM, contrastive loss for CLIP.

Both add a loss that is dropped afterwards: linear probes on the image tokens must name each cell's shape, colour and digit.
Without it the vision encoder learns an order of magnitude more slowly. Training runs in float32; a rate of 2e-3, or bfloat16
on a CPU, was seen to end in a model that ignores the image.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.train import data, models, scenes


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how fast one model learns."""

    steps: int
    batch: int
    talks: int = 1
    """Conversations about one scene: its description and ``talks`` - 1 questions."""
    rate: float = 1e-3
    warmup: int = 60
    hold: float = 0.35
    """Fraction of the run at the full rate; after it the rate falls in a straight line."""


RECIPES: dict[str, Recipe] = {
    "llava": Recipe(steps=6000, batch=48, talks=4),
    "smolvlm": Recipe(steps=4000, batch=32, talks=6),
    "clip": Recipe(steps=1500, batch=128),
}

Report = Callable[[int, float, float, dict[str, float]], None]
"""Called after every step with the step, the finished fraction, the elapsed seconds and the losses."""


class Probes(nn.Module):
    """Linear classifiers of shape, colour, digit and place on image tokens (B, n, width); never saved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {"shape": len(data.KINDS) + 1, "colour": len(scenes.COLOURS) + 1, "digit": 11, "place": 16}
        self.heads = nn.ModuleDict({key: nn.Linear(width, size) for key, size in sizes.items()})

    def forward(self, tokens: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """Return the mean loss; an empty cell weighs a tenth of a full one."""
        loss = tokens.new_zeros(())
        for key, head in self.heads.items():
            target = targets[key].flatten()
            each = F.cross_entropy(head(tokens).flatten(0, 1), target, reduction="none", ignore_index=data.IGNORED)
            weight = torch.where(target > 0, 1.0, 0.1) * (target != data.IGNORED)
            loss = loss + (each * weight).sum() / weight.sum().clamp(min=1.0)
        return loss


def _rate(recipe: Recipe, step: int, done: float) -> float:
    decay = 1.0 if done < recipe.hold else max(0.02, (1.0 - done) / (1.0 - recipe.hold))
    return recipe.rate * min(1.0, (step + 1) / recipe.warmup) * decay


def _generating_loss(model: Any, probes: Probes, batch: data.Batch) -> dict[str, Tensor]:
    encoded = model.model.get_image_features(pixel_values=batch.pixel_values, return_dict=True)
    tokens = torch.stack(list(encoded.pooler_output))
    out = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention,
        position_ids=batch.position_ids,
        mm_encoder_outputs={"image": encoded},
        use_cache=False,
    )
    logits, labels = out.logits[:, :-1], batch.labels[:, 1:]
    chosen = labels != data.IGNORED
    return {"text": F.cross_entropy(logits[chosen], labels[chosen]), "cells": probes(tokens, batch.targets)}


def _clip_batches(
    encoder: data.Encoder, seed: int, size: int
) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]]:
    """Yield pixels, tokens, the (B, B) matrix of which captions are equal, and cell targets."""
    rng = random.Random(f"train-clip-{seed}")
    while True:
        shown = [scenes.sample(rng) for _ in range(size)]
        captions = [scene.caption for scene in shown]
        tokens = encoder.processor.tokenizer(captions, padding=True, return_tensors="pt")
        numbers = torch.tensor([captions.index(caption) for caption in captions])
        cells = [data.cell_targets(scene, encoder.cells(4, 4)) for scene in shown]
        targets = {key: torch.tensor([cell[key] for cell in cells]) for key in cells[0]}
        pixels = torch.from_numpy(np.stack([encoder.pixels(scene.render()) for scene in shown]))
        yield pixels, dict(tokens), numbers[:, None] == numbers[None], targets


def _clip_loss(model: Any, probes: Probes, batch: Any, device: str) -> dict[str, Tensor]:
    pixels, tokens, equal, targets = batch
    seen = model.vision_model(pixel_values=pixels.to(device))
    read = model.text_model(**{key: value.to(device) for key, value in tokens.items()})
    image = F.normalize(model.visual_projection(seen.pooler_output), dim=-1)
    text = F.normalize(model.text_projection(read.pooler_output), dim=-1)
    similarity = model.logit_scale.exp().clamp(max=100.0) * image @ text.T
    wanted = equal.to(device) / equal.to(device).sum(1, keepdim=True)
    contrast = (F.cross_entropy(similarity, wanted) + F.cross_entropy(similarity.T, wanted)) / 2
    moved = {key: value.to(device) for key, value in targets.items()}
    return {"contrast": contrast, "cells": probes(seen.last_hidden_state[:, 1:], moved)}


def train(
    name: models.Name,
    seed: int,
    report: Report,
    steps: int | None = None,
    minutes: float | None = None,
    device: str = "cpu",
) -> tuple[models.Parts, int]:
    """Train one model and return it with the number of steps made.

    With ``minutes`` the clock decides when to stop and the result depends on the machine; otherwise the result is a function
    of the seed and of the version of torch.
    """
    torch.manual_seed(seed)
    recipe = RECIPES[name]
    total = steps or recipe.steps
    parts = models.build(name, seed)
    model: Any = parts.model
    model, probes = model.to(device).train(), Probes(models.WIDTH).to(device)
    encoder = data.Encoder(name, parts.processor)
    if name == "clip":
        pairs = _clip_batches(encoder, seed, recipe.batch)
    else:
        encoder.check()
        stream = data.Stream(encoder, seed, recipe.batch, recipe.talks)
    weights = [*model.parameters(), *probes.parameters()]
    plain = [w for w in weights if w.ndim < 2]
    matrices = [w for w in weights if w.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, recipe.rate, betas=(0.9, 0.98))
    start, step = time.monotonic(), 0
    while True:
        elapsed = time.monotonic() - start
        done = elapsed / (60 * minutes) if minutes else step / total
        if done >= 1.0:
            break
        for group in optimiser.param_groups:
            group["lr"] = _rate(recipe, step, done)
        if name == "clip":
            losses = _clip_loss(model, probes, next(pairs), device)
        else:
            losses = _generating_loss(model, probes, stream.next().to(device))
        optimiser.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        step += 1
        report(step, done, elapsed, {key: float(loss.detach()) for key, loss in losses.items()})
    model.cpu().eval()
    return parts, step
