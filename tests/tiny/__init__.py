"""Tiny checkpoints with random weights, whole: weights, configuration, a real tokenizer, image processor, chat template.

`checkpoint(name, folder)` writes one; each family has a file here with its `CHECKPOINTS`. Two layers, width 64, heads of 16. The
weights are drawn much wider than an initialiser would, so that attention is far from uniform and a wrong mask, window,
position or soft-cap shows in the logits.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path

import torch

from .common import CONTEXT, HEADS, IMAGE, KV_HEADS, LAYERS, MLP, PATCH, VOCABULARY, WIDTH, WINDOW, Parts, heat, tokenizer

__all__ = [
    "CHECKPOINTS",
    "CONTEXT",
    "HEADS",
    "IMAGE",
    "KV_HEADS",
    "LAYERS",
    "MLP",
    "PATCH",
    "VOCABULARY",
    "WIDTH",
    "WINDOW",
    "checkpoint",
    "heat",
    "tokenizer",
]

MODULES: dict[str, str] = {}
"""Which file of this package makes which checkpoint."""
CHECKPOINTS: dict[str, Callable[[], Parts]] = {}

for _found in pkgutil.iter_modules(__path__):
    for _name, _make in getattr(importlib.import_module(f".{_found.name}", __name__), "CHECKPOINTS", {}).items():
        MODULES[_name], CHECKPOINTS[_name] = _found.name, _make


def checkpoint(name: str, folder: str | Path, *, seed: int = 7) -> Path:
    """Writes the checkpoint called `name` (a key of CHECKPOINTS) as a local folder and returns it."""
    torch.manual_seed(seed)
    model, images, words, processor, template, *folders = CHECKPOINTS[name]()
    heat(model, seed)
    model.eval().tie_weights()
    folder = Path(folder)
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    words.save_pretrained(folder)
    for inner, part in (folders[0] if folders else {}).items():
        part.save_pretrained(folder / inner)
    if processor is not None:
        (folder / "processor_config.json").write_text(json.dumps(processor))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
