"""What a comparison was asked for, and how its steps are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlm_edge.progress import Progress
from vlm_edge_runtime.bundle.manifest import Manifest

from .dataset import Dataset
from .examples import Example


@dataclass(slots=True)
class Request:
    """What `compare` was asked for."""

    path: Path
    manifest: Manifest
    examples: list[Example]
    dataset: Dataset | None
    max_new_tokens: int
    accuracy_points: float
    steps: Progress


@contextmanager
def step(steps: Progress, name: str) -> Iterator[list[str]]:
    """Reports a step's start and its end, good or bad; what is appended to the list becomes its detail."""
    said: list[str] = []
    steps.start(name)
    try:
        yield said
    except BaseException as error:
        steps.failed(name, str(error) or type(error).__name__)
        raise
    steps.done(name, ", ".join(said))
