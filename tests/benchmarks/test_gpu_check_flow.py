"""`python -m benchmarks.gpu_check --cpu`: the whole script end to end, everything but the device."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_check.models import (
    BUILDS,
    FEW,
    SHAPES,
    decoder_bytes,
    describe,
    fill_bundle,
    hollow_bundle,
    unfilled,
    write_examples,
)
from benchmarks.gpu_check.stand_in import stand_in_place
from vlm_edge_runtime.bundle.reader import open_bundle, read_manifest
from vlm_edge_runtime.engines.ort_cuda import OrtCudaEngine
from vlm_edge_runtime.sessions.vision_language_model import VisionLanguageModel

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", name="hollow")
def _hollow(portable_bundle, tmp_path_factory) -> Path:
    """A kit's shapes/tiny.vlm, from a trained model of four layers."""
    from vlm_edge.targets.build import build

    scratch, shapes = tmp_path_factory.mktemp("scratch") / "model.vlm", tmp_path_factory.mktemp("kit") / "shapes"
    shutil.copytree(portable_bundle("tiny-smolvlm"), scratch)
    for name, precision in BUILDS.items():
        build(scratch, "cuda-desktop", precision=precision, name=name)
    hollow_bundle(scratch, shapes / "tiny.vlm", SHAPES["tiny"])
    describe("tiny", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "image_token_id": 4}, shapes)
    return shapes / "tiny.vlm"


def test_hollow_bundles_are_deep_and_run_when_they_are_filled(hollow, portable_bundle, tmp_path, scene) -> None:
    bundle = tmp_path / "tiny.vlm"
    shutil.copytree(hollow, bundle)
    layers = SHAPES["tiny"].text["num_hidden_layers"]
    manifest = read_manifest(bundle)
    assert manifest.contract.kv.layers == layers > FEW
    assert unfilled(bundle) and not list(bundle.rglob("*.data"))
    made = fill_bundle(bundle, "builds")
    assert made and all(size == (bundle / name).stat().st_size for name, size in made.items())
    assert fill_bundle(bundle, "builds") == {}
    few = read_manifest(portable_bundle("tiny-smolvlm"))
    assert few.contract.kv.layers == FEW
    for build in BUILDS:
        found = open_bundle(bundle, build=build, verify=False)
        names = [spec.name for spec in found.graphs["decoder"].inputs if spec.name.startswith("past_key_values.")]
        assert len(names) == 2 * layers == 2 * found.kv.layers
        with VisionLanguageModel(found, OrtCudaEngine(found, _place=stand_in_place())) as vlm:
            answer = vlm.generate("describe", images=[scene[0]], max_new_tokens=5, temperature=0.0, ignore_eos=True)
            assert len(answer.tokens) == 5
    assert 0 < decoder_bytes(bundle, "cuda-int4") < decoder_bytes(bundle, "cuda-fp16")


@pytest.mark.slow
def test_filled_portable_graphs_can_be_built_from(hollow, tmp_path) -> None:
    from vlm_edge.targets.build import build

    bundle = tmp_path / "tiny.vlm"
    shutil.copytree(hollow, bundle)
    fill_bundle(bundle, "portable")
    made = build(bundle, "cpu-int4")  # checks hashes, and every lowered graph against its portable one
    assert made.options["decoder.kv_cache"] == "shared" and made.kv.layers == SHAPES["tiny"].text["num_hidden_layers"]


@pytest.mark.slow
def test_the_whole_flow_on_the_cpu_provider(hollow, portable_bundle, tmp_path) -> None:
    kit = tmp_path / "kit"
    shutil.copytree(hollow.parent, kit / "shapes")
    for name in ("tiny-llava", "tiny-clip"):
        shutil.copytree(portable_bundle(name), kit / "trained" / f"{name}.vlm")
        write_examples(name, kit / "trained" / f"{name}.examples", 8 if name == "tiny-llava" else 16)
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--cpu", "--minutes", "10"]
    command += ["--kit", str(kit), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "out" / "none-cpu.json").read_text())
    assert document["mode"] == "cpu" and "--cpu" in document["command"]
    steps = {step["name"]: step for step in document["steps"]}
    assert {name: step["message"] for name, step in steps.items() if step["state"] == "failed"} == {}
    for name in ("tiny-llava cuda-fp16", "tiny-llava cuda-int4", "tiny-clip cuda-fp16"):
        result = steps[f"{name}: parity"]["result"]
        assert result["verdict"] == "PASS" and result["right"] >= result["reference_right"] - 1 > 3
    for name in ("tiny ort-cuda cuda-fp16: round 1", "tiny transformers eager: round 1"):
        assert steps[name]["result"]["ttft_s"] > 0 and "tpot_s" in steps[name]["result"]
    page = (tmp_path / "out" / "none-cpu.md").read_text()
    assert "No GPU was used" in page and "| ort-cuda cuda-fp16 |" in page and "| transformers eager |" in page
    assert "does not load" in page or "TensorRT-RTX's default engine" not in page
