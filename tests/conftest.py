"""What many tests share: tiny checkpoints and the bundles exported from them, made once and kept between runs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may reach for the network

import pytest
from filelock import FileLock

from vlm_edge_runtime.errors import BundleError

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell that runs tests in the background; children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "tests"
TRAINED = ROOT / "tests" / "checkpoints"
_KEPT_SECONDS = 7 * 24 * 3600
_SOURCES = ("vlm_edge/export", "vlm_edge/families/base.py", "runtimes/vlm_edge_runtime/bundle/writer.py")
_PATCHES = ROOT / "vlm_edge" / "export" / "patches"
_FAMILIES = ROOT / "vlm_edge" / "families"
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")


_TURNS = {"coverage": 0, "export": 2}
"""The longest file first; those that need every bundle last, when the others have made them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the folders of tests in an order in which two processes seldom wait for one bundle."""
    items.sort(key=lambda item: _TURNS.get(item.path.relative_to(ROOT / "tests").parts[0], 1))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Here, not beside the tests that read it, so that a run of all tests can have it too."""
    parser.addoption("--write-coverage", action="store_true", help="Write what is found into vlm_edge/families/coverage.json.")


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Torch takes every core otherwise, and the tests share the machine."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def bundle_cache() -> Iterator[Path]:
    """A folder for what is slow to make, named by everything it is made from: a changed exporter starts afresh."""
    folder = CACHE / _digest()
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    for other in CACHE.iterdir():
        if other.is_dir() and time.time() - other.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(other, ignore_errors=True)
    yield folder


@pytest.fixture(scope="session")
def tiny_checkpoint(bundle_cache: Path) -> Callable[[str], Path]:
    """`tiny_checkpoint(name)` → the folder of a checkpoint: a name of tests/tiny, or one of tests/checkpoints."""

    def make(name: str) -> Path:
        if (TRAINED / name).is_dir():
            return TRAINED / name
        import tiny

        made_by = [ROOT / "tests" / "tiny" / f"{module}.py" for module in ("common", tiny.MODULES[name])]
        folder = bundle_cache / "checkpoints" / f"{name}-{_hash(*made_by)[:12]}"
        if not folder.exists():
            scratch = folder.with_name(f".{name}.{os.getpid()}")
            tiny.checkpoint(name, scratch)
            _place(scratch, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def portable_bundle(bundle_cache: Path, tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    """`portable_bundle(name)` → the checkpoint's bundle with its portable graphs. It is shared: copy it before changing it."""

    def make(name: str) -> Path:
        source = tiny_checkpoint(name)
        weights = [source / "model.safetensors", source / "config.json"] if source.parent == TRAINED else []
        made_from = _hash(*weights, *_family_files(source)) + source.name
        folder = bundle_cache / f"{name}-{hashlib.sha256(made_from.encode()).hexdigest()[:12]}.vlm"
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # another process may be making it
            if not folder.exists():
                from vlm_edge.export import export

                scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
                export(source, scratch, overwrite=True)
                _place(scratch, folder)
        return folder

    return make


def _family_files(source: Path) -> list[Path]:
    """The modules that export a checkpoint: its family's, and what that imports: shared parts, patches, the zoo's model."""
    from vlm_edge.families import registry

    config = json.loads((source / "config.json").read_text())
    entry = registry.lookup(config["model_type"], config.get("architectures") or ())
    waiting = [_FAMILIES / f"{entry.family}.py"]
    if entry.zoo:
        waiting.append(ROOT / "vlm_edge" / "zoo" / f"{entry.zoo}.py")
    found: set[Path] = set()
    while waiting:
        file = waiting.pop()
        if file not in found and file.is_file():
            found.add(file)
            text = file.read_text(encoding="utf-8")
            waiting += [file.with_name(f"{name}.py") for name in re.findall(r"^from \.(\w+) import", text, re.MULTILINE)]
            waiting += [_PATCHES / f"{name}.py" for name in re.findall(r"vlm_edge\.export\.patches\.(\w+)", text)]
    return sorted(found)


def _place(scratch: Path, folder: Path) -> None:
    """Renames into place; another run of the tests may have been faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        scratch.rename(folder)
    except OSError:
        shutil.rmtree(scratch)
        if not folder.is_dir():
            raise BundleError(f"{folder} could not be made.") from None


def _digest() -> str:
    files = [file for source in _SOURCES for file in _files(ROOT / source)]
    digest = hashlib.sha256(_hash(*files).encode())
    for name in _PACKAGES:
        try:
            digest.update(f"{name}={importlib.metadata.version(name)}".encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(f"{name}=none".encode())
    return digest.hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("*.py")) if path.is_dir() else [path]


def _hash(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def scene(tmp_path_factory) -> tuple[Path, str]:
    """A held-out picture and the right caption of it."""
    from benchmarks.train import scenes

    example = scenes.held_out_examples(1, seed=7)[0]
    picture = tmp_path_factory.mktemp("scene") / "scene.png"
    example.image.save(picture)
    return picture, example.answer
