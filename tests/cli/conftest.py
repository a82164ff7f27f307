"""Trained bundles with a 4-bit build for tests that run the real command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm_edge.targets.build import build


@pytest.fixture(scope="session")
def trained_bundle(tmp_path_factory, portable_bundle) -> Callable[[str], Path]:
    """`trained_bundle("tiny-llava")` → a copy of the bundle with a cpu-int4 build. Shared: copy it before changing it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("trained") / f"{name}.vlm"
            shutil.copytree(portable_bundle(name), folder)
            build(folder, "cpu-int4")
            made[name] = folder
        return made[name]

    return make
