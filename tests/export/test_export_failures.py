"""Bad input, a full disk, Ctrl-C: one clear error, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import onnx_ir as ir
import pytest

from vlm_edge.export import checkpoint, export, pipeline
from vlm_edge.export.check import check
from vlm_edge.export.trace import trace
from vlm_edge.export.weights import WeightFile
from vlm_edge.progress import Silent
from vlm_edge_runtime.errors import BundleError, ExportError, UnsupportedModelError


class Steps(Silent):
    """Remembers the steps; `at[step]` is called when that step starts."""

    def __init__(self, **at) -> None:
        self.at = {step.replace("_", " ", 1): act for step, act in at.items()}
        self.started: list[str] = []
        self.broken: list[tuple[str, str]] = []

    def start(self, step: str, total: float | None = None) -> None:
        self.started.append(step)
        self.at.get(step, lambda: None)()

    def failed(self, step: str, reason: str) -> None:
        self.broken.append((step, reason))


def _copy(folder: Path, out: Path) -> Path:
    return Path(shutil.copytree(folder, out))


def _edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_unknown_model_type_is_refused_before_anything_is_loaded(tmp_path, tiny_checkpoint):
    source = _copy(tiny_checkpoint("llava-llama"), tmp_path / "source")
    _edit_config(source, model_type="llavas")
    (source / "model.safetensors").unlink()  # never looked at
    steps = Steps()
    with pytest.raises(UnsupportedModelError, match=r"'llavas'.*llava"):
        export(source, tmp_path / "out.vlm", progress=steps)
    assert steps.started == ["load"]
    assert steps.broken[0][0] == "load"
    assert not (tmp_path / "out.vlm").exists()


def test_text_only_type_is_not_exported_as_text(tmp_path, tiny_checkpoint):
    source = _copy(tiny_checkpoint("llava-llama"), tmp_path / "source")
    _edit_config(source, model_type="llama")
    with pytest.raises(UnsupportedModelError, match="'llama'"):
        export(source, tmp_path / "out.vlm")


def test_hub_id_that_cannot_be_had(tmp_path):
    with pytest.raises(ExportError, match=r"'nobody/nothing' is not a local directory, and the hub could not be reached"):
        export("nobody/nothing", tmp_path / "out.vlm")


def test_folder_without_config(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match=r"no config\.json|cannot be loaded"):
        export(tmp_path / "empty", tmp_path / "out.vlm")


def test_truncated_weights(tmp_path, tiny_checkpoint):
    source = _copy(tiny_checkpoint("clip"), tmp_path / "source")
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ExportError, match=r"damaged|cannot be loaded"):
        export(source, tmp_path / "out.vlm")


def test_missing_tokenizer(tmp_path, tiny_checkpoint):
    source = _copy(tiny_checkpoint("clip"), tmp_path / "source")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).unlink()
    with pytest.raises(ExportError, match="no tokenizer"):
        export(source, tmp_path / "out.vlm")
    assert not (tmp_path / "out.vlm").exists()


def test_existing_bundle_is_not_replaced(tmp_path, tiny_checkpoint):
    (tmp_path / "out.vlm").mkdir()
    with pytest.raises(BundleError, match="exists already"):
        export(tiny_checkpoint("clip"), tmp_path / "out.vlm")


def test_model_object_needs_its_processor(tmp_path, tiny_checkpoint):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_checkpoint("clip"))
    with pytest.raises(ExportError, match="pass processor="):
        export(model, tmp_path / "out.vlm")


def test_graph_that_differs_leaves_nothing(tmp_path, tiny_checkpoint, monkeypatch):
    """The traced weights are spoilt between tracing and checking, as a faulty exporter would."""

    class Spoiling(WeightFile):
        def save(self, model, file):
            if (value := model.graph.initializers.get("vision_model.post_layernorm.bias")) is not None:
                value.const_value = ir.tensor(value.const_value.numpy() + 1.0, name=value.name)
            return super().save(model, file)

    monkeypatch.setattr(pipeline, "WeightFile", Spoiling)
    with pytest.raises(ExportError, match=r"Graph 'vision_encoder', case .*image_embeds differs"):
        export(tiny_checkpoint("clip"), tmp_path / "out" / "a.vlm")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("delay", [0.0, 0.7])
def test_ctrl_c_while_tracing_leaves_nothing(tmp_path, tiny_checkpoint, delay):
    def interrupt() -> None:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()

    steps = Steps(trace_vision_encoder=interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(tiny_checkpoint("clip"), tmp_path / "out" / "a.vlm", progress=steps)
    assert list((tmp_path / "out").iterdir()) == []
    assert steps.broken[-1][0].startswith("trace")


def test_the_next_export_works_after_an_interrupted_one(tmp_path, tiny_checkpoint):
    folder = tiny_checkpoint("llava-llama")
    config, entry, family = checkpoint.identify(folder, None, False)
    loaded = checkpoint.load(folder, family.auto_class, config)
    plan = next(plan for plan in family.split(loaded, entry).graphs if plan.role == "projector")
    with WeightFile(tmp_path) as weights:
        weights.save(trace(plan, loaded.model), "projector.onnx")
    assert check(plan, loaded.model, tmp_path / "projector.onnx").verdict == "PASS"


@pytest.fixture
def full_disk(tmp_path):
    """A file system with room for less than a bundle."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_leaves_nothing(full_disk, tiny_checkpoint):
    with pytest.raises(ExportError, match=r"Writing .*a\.vlm failed: No space left on device"):
        export(tiny_checkpoint("clip"), full_disk / "a.vlm")
    assert list(full_disk.iterdir()) == []


def test_place_that_cannot_be_written(tmp_path, tiny_checkpoint):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ExportError, match=r"Writing .*failed: (Not a directory|File exists)"):
        export(tiny_checkpoint("clip"), tmp_path / "file" / "a.vlm")
