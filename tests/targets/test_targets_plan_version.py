"""Plans of another version of the format: refused by one sentence, whatever else they hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vlm_edge.targets.native.plan_file import VERSION
from vlm_edge_runtime import _native
from vlm_edge_runtime.errors import DeviceError

HEADER = Path(__file__).resolve().parents[2] / "runtimes" / "native" / "plan.h"


def test_the_writer_and_the_reader_have_one_version():
    (read,) = re.findall(r"#define PLAN_VERSION (\d+)", HEADER.read_text())
    assert int(read) == VERSION


@pytest.mark.parametrize(("version", "what"), [(VERSION - 1, "run `vlm-edge build` again"), (VERSION + 1, "update vlm-edge")])
def test_a_plan_of_another_version_is_refused(tmp_path: Path, version: int, what: str):
    plan = tmp_path / "decoder.plan"
    plan.write_bytes(b"VLMEPLAN" + version.to_bytes(4, "little") + bytes(4084))
    with pytest.raises(DeviceError) as refused:
        _native.Session(str(plan), "decoder", plan=True)
    sentence = str(refused.value)
    assert str(plan) in sentence and f"has version {version} of" in sentence and f"runs version {VERSION}:" in sentence
    assert what in sentence and "`vlm-edge build` again" in sentence
