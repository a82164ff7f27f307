"""A build whose graphs are all plans, in a process that cannot have ONNX Runtime."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from vlm_edge.targets.build import build
from vlm_edge.targets.target import load_target

SCRIPT = """
import json, sys
from pathlib import Path

sys.modules["onnxruntime"] = None  # not to be found, and not to be imported
from vlm_edge_runtime import _native, load
from vlm_edge_runtime.errors import DeviceError

bundle, name, picture = sys.argv[1:]
try:
    with load(bundle, build=name) as vlm:
        found = {"text": vlm.generate("describe the image.", images=[picture]).text.strip()}
except DeviceError as error:
    found = {"error": str(error)}
maps = Path("/proc/self/maps")
found["loaded"] = _native.runtime_version() is not None or (maps.is_file() and "onnxruntime" in maps.read_text())
print(json.dumps(found))
"""


def run(*arguments: object) -> dict[str, object]:
    environment = {key: value for key, value in os.environ.items() if key != "VLM_EDGE_ONNXRUNTIME"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def bundle(portable_bundle, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "tiny-llava.vlm"
    shutil.copytree(portable_bundle("tiny-llava"), folder)
    target = load_target("cpu-int4")
    made = build(
        folder, msgspec.structs.replace(target, options=msgspec.structs.replace(target.options, encoder_kernels="native"))
    )
    assert {entry.format for entry in made.graphs.values()} == {"plan"}
    assert set(made.graphs) == {"vision_encoder", "projector", "embed_tokens", "decoder"}
    return folder


def test_a_build_of_plans_answers(bundle, scene):
    picture, answer = scene
    assert run(bundle, "cpu-int4", picture) == {"text": answer, "loaded": False}


def test_a_graph_that_is_no_plan_says_what_is_missing(bundle, scene):
    found = run(bundle, "portable", scene[0])
    assert "ONNX Runtime is not installed" in str(found["error"]) and "pip install" in str(found["error"])
