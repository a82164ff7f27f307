"""Adding a checkpoint type to a known family is one line of data."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from vlm_edge.export import checkpoint
from vlm_edge.families import registry
from vlm_edge_runtime.bundle.manifest import FixedPlaceholder
from vlm_edge_runtime.errors import UnsupportedModelError


class MadeUpConfig(LlavaConfig):
    model_type = "made_up_vlm"


class MadeUpForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = MadeUpConfig


@pytest.fixture
def made_up(tmp_path, tiny_checkpoint):
    """A checkpoint of a type that transformers knows (through its own registration) and vlm-edge does not."""
    AutoConfig.register("made_up_vlm", MadeUpConfig, exist_ok=True)
    AutoModelForImageTextToText.register(MadeUpConfig, MadeUpForConditionalGeneration, exist_ok=True)
    folder = tmp_path / "made-up"
    folder.mkdir()
    for file in tiny_checkpoint("llava-llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "made_up_vlm"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _add(monkeypatch, tmp_path, line: str) -> None:
    file = tmp_path / "more.toml"
    file.write_text(line)
    monkeypatch.setattr(registry, "FILES", [*registry.FILES, file])


def test_without_a_line_it_is_refused(made_up):
    with pytest.raises(UnsupportedModelError, match="made_up_vlm"):
        checkpoint.identify(made_up, None, False)


def test_with_one_line_it_splits(made_up, tmp_path, monkeypatch):
    _add(monkeypatch, tmp_path, '[projector]\nmade_up_vlm = { layout = "image", projector = "model.multi_modal_projector" }\n')
    config, entry, family = checkpoint.identify(made_up, None, False)
    split = family.split(checkpoint.load(made_up, family.auto_class, config), entry)
    assert [plan.role for plan in split.graphs] == ["vision_encoder", "projector", "embed_tokens", "decoder"]
    assert isinstance(split.contract.modalities[0].placeholder, FixedPlaceholder)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('made_up_vlm = { layout = "round", projector = "model.multi_modal_projector" }', "made_up_vlm.*more.toml.*wrong"),
        ('made_up_vlm = { layout = "image" }', "projector"),
        ('made_up_vlm = { layout = "image", projector = "model.nothing" }', "no 'model.nothing'.*more.toml"),
    ],
)
def test_a_wrong_line_is_named(made_up, tmp_path, monkeypatch, line, said):
    _add(monkeypatch, tmp_path, f"[projector]\n{line}\n")
    config, entry, family = checkpoint.identify(made_up, None, False)
    with pytest.raises(UnsupportedModelError, match=said):
        family.split(checkpoint.load(made_up, family.auto_class, config), entry)
