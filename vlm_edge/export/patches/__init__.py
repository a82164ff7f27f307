"""Forwards of transformers' classes that are exchanged while a model is traced, and only then.

Some models compute attention by hand instead of asking transformers' attention interface. A module here has one forward for one
such class, which does the same through `vlm_edge.export.attention.attention`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

FORWARDS: dict[str, str] = {
    "BlipAttention": "blip_vision",
    "BlipTextSelfAttention": "blip_text",
    "TrOCRAttention": "trocr",
}
"""Class name → the module of this package whose `forward` takes the place of the class's own."""


@contextmanager
def exchanged(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the classes of `model` that have another forward here use it; afterwards they are as before."""
    classes = {type(module) for module in model.modules() if type(module).__name__ in FORWARDS}
    before = {found: found.__dict__.get("forward") for found in classes}
    try:
        for found in classes:
            found.forward = importlib.import_module(f".{FORWARDS[found.__name__]}", __name__).forward
        yield
    finally:
        for found, forward in before.items():
            if forward is None:
                del found.forward
            else:
                found.forward = forward
