"""Plans of another version of the format: refused by one sentence, whatever else they hold."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from vlm_edge.targets.native.plan_file import VERSION
from vlm_edge_runtime import _native, load
from vlm_edge_runtime.bundle.manifest import Build, GraphEntry
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.bundle.writer import BuildWriter
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


def test_load_refuses_a_build_of_another_version_by_itself(tmp_path: Path, portable_bundle):
    bundle = Path(shutil.copytree(portable_bundle("tiny-llava"), tmp_path / "b.vlm"))
    with BuildWriter(bundle, "cpu-old", overwrite=False) as writer:
        (writer.path / "decoder.plan").write_bytes(b"VLMEPLAN" + (VERSION - 1).to_bytes(4, "little") + bytes(4084))
        portable = open_bundle(bundle, verify=False).graphs["decoder"]
        graph = GraphEntry(
            role="decoder", model=writer.ref("decoder.plan"), inputs=portable.inputs, outputs=portable.outputs, format="plan"
        )
        writer.commit(Build(name="cpu-old", target="cpu-int4", backend="ort-cpu", precision={}, graphs={"decoder": graph}))
    with pytest.raises(DeviceError, match=rf"version {VERSION - 1} of its format, this runtime runs version {VERSION}: run"):
        load(bundle, build="cpu-old")
