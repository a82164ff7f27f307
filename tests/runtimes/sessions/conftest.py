"""Bundles with builds, and sessions over them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vlm_edge_runtime import DualEncoder, VisionLanguageModel, load

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native"))  # the toy decoder of the native tests serves here too


@pytest.fixture(scope="session")
def built_bundle(portable_bundle, tmp_path_factory) -> Callable[[str, str], Path]:
    """`built_bundle(name, target)` → a bundle that has the target's build besides the portable graphs."""
    root = tmp_path_factory.mktemp("built")

    def make(name: str, target: str) -> Path:
        from vlm_edge.targets import load_target
        from vlm_edge.targets.build import build

        folder = root / f"{name}.vlm"
        if not folder.exists():
            shutil.copytree(portable_bundle(name), folder)
        if not (folder / "builds" / target).exists():
            build(folder, load_target(target))
        return folder

    return make


@pytest.fixture(scope="session")
def _opened() -> Iterator[dict[tuple[str, str], VisionLanguageModel | DualEncoder]]:
    sessions: dict[tuple[str, str], VisionLanguageModel | DualEncoder] = {}
    yield sessions
    for session in sessions.values():
        session.close()


@pytest.fixture
def session(built_bundle, portable_bundle, _opened) -> Callable[..., VisionLanguageModel | DualEncoder]:
    """`session(name, build)` → an open session with empty caches. It is shared: do not close it."""

    def make(name: str, build: str = "cpu-fp32"):
        if (name, build) not in _opened:
            path = portable_bundle(name) if build == "portable" else built_bundle(name, build)
            _opened[name, build] = load(path, build=build)
        found = _opened[name, build]
        found.clear_caches()
        return found

    return make
