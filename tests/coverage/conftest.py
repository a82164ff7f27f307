"""Bundles with every CPU build, compared with PyTorch: what the coverage table is made from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from filelock import FileLock

from vlm_edge.families import coverage

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "tests"


@pytest.fixture(scope="session")
def built_bundle(portable_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`built_bundle(name)` → a copy of the checkpoint's bundle with the three CPU builds."""
    from vlm_edge.targets.build import build

    def make(name: str) -> Path:
        source = portable_bundle(name)
        folder = tmp_path_factory.mktemp("built") / source.name
        shutil.copytree(source, folder)
        for target in coverage.BUILDS[1:]:
            build(folder, target)
        return folder

    return make


@pytest.fixture(scope="session")
def keep(request: pytest.FixtureRequest) -> Callable[[str, coverage.CheckpointResult], None]:
    """Writes one checkpoint's result into the table's data, where that was asked for."""
    wanted = bool(request.config.getoption("--write-coverage"))

    def write(name: str, result: coverage.CheckpointResult) -> None:
        if not wanted:
            return
        known = {name for one in coverage.systems() for name in one.checkpoints}
        with FileLock(CACHE / "coverage.lock"):  # the tests run in several processes
            found = {key: value for key, value in (coverage.results() | {name: result}).items() if key in known}
            text = msgspec.json.format(msgspec.json.encode(dict(sorted(found.items()))), indent=2)
            coverage.RESULTS.write_bytes(text + b"\n")

    return write
