"""The installed wheel in an environment of its own that has neither PyTorch nor transformers, as on a device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_edge.targets.build import build

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import importlib.util, json, sys
import vlm_edge_runtime
assert "site-packages" in vlm_edge_runtime.__file__, vlm_edge_runtime.__file__
assert not [name for name in ("torch", "transformers", "onnx", "onnx_ir") if importlib.util.find_spec(name)]
from vlm_edge_runtime import load
with load(sys.argv[1]) as vlm:
    answer = vlm.generate("describe the image.", images=[sys.argv[2]])
    print(json.dumps({"text": answer.text.strip(), "onnxruntime module": "onnxruntime" in sys.modules}))
"""


@pytest.fixture(scope="module")
def device(tmp_path_factory) -> Path:
    """A fresh environment with the wheel and its own dependencies; the folder of its programs."""
    folder = tmp_path_factory.mktemp("device")
    quiet = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*quiet, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("vlm_edge-*.whl")
    assert "abi3" in wheel.name
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    programs = folder / "env/bin"
    install = [programs / "python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run([*install, "--constraint", ROOT / "constraints.txt", wheel], check=True)
    return programs


def _run(device: Path, *command: object) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(device / str(command[0])), *map(str, command[1:])], capture_output=True, text=True, cwd=device, env=environment
    )


@pytest.mark.slow
def test_a_trained_bundle_answers_without_pytorch(device, scene, portable_bundle, tmp_path):
    bundle = tmp_path / "tiny-llava.vlm"
    shutil.copytree(portable_bundle("tiny-llava"), bundle)
    build(bundle, "cpu-int4")
    picture, answer = scene

    done = _run(device, "python", "-c", SCRIPT, bundle, picture)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"text": answer, "onnxruntime module": False}

    done = _run(device, "vlm-edge", "run", bundle, "--image", picture, "--prompt", "describe the image.")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answer

    done = _run(device, "vlm-edge", "inspect", bundle, "--verify", "--json")
    assert json.loads(done.stdout)["verified"] is True


@pytest.mark.slow
def test_what_needs_pytorch_says_so(device, tmp_path):
    done = _run(device, "vlm-edge", "export", "anything", tmp_path / "out.vlm")
    assert done.returncode == 3
    assert "pip install 'vlm-edge[export]'" in done.stderr
    assert not (tmp_path / "out.vlm").exists()


@pytest.mark.slow
def test_listings_work_on_a_device(device):
    assert "cpu-int4" in _run(device, "vlm-edge", "targets").stdout
    assert "LLaVA" in _run(device, "vlm-edge", "families").stdout
