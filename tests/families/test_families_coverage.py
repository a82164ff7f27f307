"""The coverage table: every system is accounted for, and README.md says what the tests found."""

from __future__ import annotations

import re
from pathlib import Path

import tiny

from vlm_edge.families import coverage, registry

ROOT = Path(__file__).resolve().parents[2]


def test_every_system_is_tested_or_says_why_not():
    for one in coverage.systems():
        assert bool(one.checkpoints) != bool(one.missing), f"{one.name}: either a checkpoint or a reason"
        assert one.family in registry.families() or one.missing, one.name
        for name in one.checkpoints:
            assert name in tiny.CHECKPOINTS or (ROOT / "tests" / "checkpoints" / name).is_dir(), f"{one.name}: {name}"


def test_every_system_with_a_checkpoint_has_a_line_in_the_registry():
    known = {entry.model_type for entry in registry.entries()}
    for one in coverage.systems():
        assert one.missing or one.model_type.partition(":")[0] in known, one.name


def test_names_are_unique():
    names = [one.name for one in coverage.systems()]
    assert len(set(names)) == len(names)


def test_the_results_belong_to_systems():
    known = {name for one in coverage.systems() for name in one.checkpoints}
    assert set(coverage.results()) <= known


def test_the_readme_has_the_table_as_it_is_generated():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- coverage -->\n(.*?)<!-- /coverage -->", text, re.DOTALL)
    assert found is not None and found[1] == coverage.markdown(), "run `make coverage`"
