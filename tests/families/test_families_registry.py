"""The registry: data that says which family carries a model type."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vlm_edge.families import registry
from vlm_edge_runtime.errors import UnsupportedModelError


def test_every_entry_belongs_to_a_family_that_exists():
    known = registry.families()
    assert {"projector", "dual_encoder"} <= set(known)
    assert {entry.family for entry in registry.entries()} <= set(known)


@pytest.mark.parametrize("name", ["projector", "dual_encoder"])
def test_a_family_is_named_as_its_file(name):
    assert registry.load(name).name == name


def test_unknown_type_names_the_nearest_and_the_way_to_add_one():
    with pytest.raises(UnsupportedModelError) as error:
        registry.lookup("llavva")
    assert "'llavva'" in str(error.value)
    assert "llava" in str(error.value)
    assert "registry.toml" in str(error.value)


def test_unknown_type_with_nothing_near_lists_all():
    with pytest.raises(UnsupportedModelError, match=r"clip.*qwen2_vl"):
        registry.lookup("zzzzzz")


def test_unknown_family():
    with pytest.raises(UnsupportedModelError, match=r"no family 'nope'.*projector"):
        registry.load("nope")


def test_damaged_registry_file(tmp_path, monkeypatch):
    file = tmp_path / "mine.toml"
    file.write_text("[projector\n")
    monkeypatch.setattr(registry, "FILES", [*registry.FILES, file])
    with pytest.raises(UnsupportedModelError, match=r"mine\.toml cannot be read"):
        registry.lookup("llava")


def test_reading_the_registry_imports_no_torch():
    code = (
        "import sys; from vlm_edge.families.registry import entries, families; assert entries() and families();"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
