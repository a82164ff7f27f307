"""Exporting a model object: it comes back as it was, nothing is printed, and the steps are reported in order."""

from __future__ import annotations

import copy

import pytest
import torch
from test_export_failures import Steps
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPProcessor

from vlm_edge.export import export
from vlm_edge_runtime.bundle.reader import open_bundle


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_checkpoint):
    """A CLIP in training mode and half precision, exported from the object."""
    folder = tiny_checkpoint("clip")
    model = AutoModel.from_pretrained(folder, dtype=torch.float16, attn_implementation="sdpa").train()
    model.text_model.eval()  # modes may be mixed
    processor = CLIPProcessor(AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    before = (
        copy.deepcopy(model.state_dict()),
        {name: module.training for name, module in model.named_modules()},
        model.config.to_json_string(),
    )
    out = tmp_path_factory.mktemp("object") / "a.vlm"
    steps = Steps()
    manifest = export(model, out, processor=processor, progress=steps)
    return model, before, out, steps, manifest


def test_the_model_is_as_it_was(exported):
    model, (weights, training, config), *_ = exported
    assert {name: module.training for name, module in model.named_modules()} == training
    assert model.config.to_json_string() == config
    assert model.config._attn_implementation == "sdpa"
    now = model.state_dict()
    assert list(now) == list(weights)
    assert all(now[name].dtype == torch.float16 and torch.equal(now[name], weights[name]) for name in weights)


def test_the_bundle_is_whole(exported):
    *_, out, _, manifest = exported
    bundle = open_bundle(out)
    assert manifest.source.architecture == "CLIPModel"
    assert len(manifest.source.revision) == 64
    assert {"torch", "transformers", "onnxscript"} <= set(manifest.versions)
    assert bundle.read_json("preprocessor_config.json")["crop_size"] == {"height": 32, "width": 32}
    assert bundle.read_json("tokenizer.json")["model"]["type"] == "BPE"
    assert bundle.read_json("config.json")["model_type"] == "clip"
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


def test_steps_are_reported_in_order(exported):
    *_, steps, _ = exported
    assert steps.started == [
        "load",
        "split",
        "trace vision_encoder",
        "trace text_encoder",
        "check vision_encoder",
        "check text_encoder",
        "write",
    ]
    assert not steps.broken


def test_nothing_is_printed(tmp_path, tiny_checkpoint, capfd, recwarn):
    export(tiny_checkpoint("clip"), tmp_path / "a.vlm", check=False)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert [str(warning.message) for warning in recwarn] == []
    assert open_bundle(tmp_path / "a.vlm").manifest.parity is None  # nobody compared, and the manifest says so


def test_local_revision_follows_the_weights(portable_bundle, tiny_checkpoint):
    manifest = open_bundle(portable_bundle("clip")).manifest
    assert len(manifest.source.revision) == 64
    assert manifest.source.name == tiny_checkpoint("clip").name
