"""`compare` end to end: against PyTorch, without it, stored, as JSON and as a page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import msgspec
import pytest
from planted import copy

from vlm_edge.parity import Example, ParityReport, bisect_bundle, compare, load_dataset
from vlm_edge.parity.examples import built_in
from vlm_edge.targets.build import build
from vlm_edge_runtime.bundle.reader import read_manifest
from vlm_edge_runtime.errors import DeviceError, ParityError, TargetError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def llava(portable_bundle, tmp_path_factory):
    """The trained model with an 8-bit build. Shared: what tests store in it is replaced by the next."""
    bundle = copy(portable_bundle("tiny-llava"), tmp_path_factory.mktemp("compare"))
    build(bundle, "cpu-int8")
    return bundle


@pytest.fixture(scope="module")
def report(llava, tiny_checkpoint):
    return compare(llava, tiny_checkpoint("tiny-llava"), max_new_tokens=8)


@pytest.mark.parametrize("name", ["llava-llama", "smolvlm", "qwen2_vl", "clip", "siglip"])
def test_every_kind_of_bundle_passes(portable_bundle, tiny_checkpoint, name):
    found = compare(portable_bundle(name), tiny_checkpoint(name), max_new_tokens=6, store=False)
    assert found.verdict == "PASS", [row for row in found.rows() if row.verdict != "PASS"]
    assert found.exit_code == 0
    assert found.builds[0].preprocessing.distance.within(1e-6)
    if found.builds[0].logits is not None:
        assert found.builds[0].logits.distance.within(1e-4)
        assert found.builds[0].logits.examples[-1].steps


def test_a_build_against_pytorch(report):
    portable, built = report.builds
    assert (portable.name, built.name) == ("portable", "cpu-int8")
    assert portable.verdict == "PASS"
    assert built.verdict != "FAIL"
    assert {graph.tolerance for graph in portable.graphs} == {1e-4}
    assert built.logits.mean_kl < 0.01
    assert built.precision.startswith("vision_encoder int8")


def test_other_weights_than_the_bundles_are_noted(portable_bundle, tiny_checkpoint, tmp_path, report):
    import tiny

    assert report.note == ""
    other = tiny.checkpoint("clip", tmp_path / "other", seed=8)
    found = compare(portable_bundle("clip"), other, store=False)
    assert found.verdict == "FAIL"
    assert "not those the bundle was exported from" in found.note
    assert found.rows()[0].note == found.note


def test_verdicts_are_stored(report, llava):
    manifest = read_manifest(llava)
    assert manifest.parity.verdict == "PASS"
    assert manifest.parity.reference == "PyTorch, tiny-llava"
    stored = manifest.builds["cpu-int8"].parity
    assert stored.verdict == report.builds[1].verdict
    subjects = [check.subject for check in stored.checks]
    assert subjects[0] == "preprocessing" and subjects[-2:] == ["logits", "greedy text"]
    assert next(check for check in stored.checks if check.subject == "logits").metric["mean_kl"] >= 0


def test_rows_and_json(report):
    rows = report.rows()
    assert {row.what for row in rows} == {"portable", "cpu-int8"}
    assert all(row.numbers for row in rows)
    plain = json.loads(report.to_json())
    assert plain["verdict"] == report.verdict and plain["builds"][0]["verdict"] == "PASS"
    for computed in ("verdict", "exit_code"):
        del plain[computed]
    for one in plain["builds"]:
        del one["verdict"]
    assert msgspec.convert(plain, ParityReport).rows() == rows


def test_the_page_needs_nothing_else(report, tmp_path):
    page = tmp_path / "parity.html"
    report.to_html(page)
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    loads = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", text)
    assert loads and all(link.startswith(("data:image/png;base64,", "#")) for link in loads)
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(drawings) == 6  # graphs, divergence and logits of two builds
    for drawing in drawings:
        assert "nan" not in drawing.lower()
        ElementTree.fromstring(drawing)
    assert "prefers-color-scheme: dark" in text
    assert "cpu-int8" in text and report.examples[0].prompt in text


def test_words_of_a_model_are_escaped_on_the_page(report, tmp_path):
    marked = msgspec.convert(msgspec.to_builtins(report), ParityReport)
    marked.builds[0].texts[0].text = "<script>alert(1)</script>"
    marked.builds[0].graphs[0].role = "<b>role</b>"
    marked.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and "<b>role" not in text


def test_a_dataset_decides_about_a_quantised_build(llava, tiny_checkpoint, tmp_path):
    lines = []
    for i, example in enumerate(built_in()[:4]):
        example.images[0].save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "prompt": example.prompt, "answer": "four"}))
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    found = compare(
        llava,
        tiny_checkpoint("tiny-llava"),
        builds=["cpu-int8"],
        dataset=load_dataset(tmp_path / "set.jsonl"),
        max_new_tokens=4,
        store=False,
    )
    accuracy = found.builds[0].accuracy
    assert accuracy.examples == 4
    assert 0 <= accuracy.reference <= 1
    assert found.builds[0].checks()[-1].subject == "task accuracy"


def test_retrieval_of_a_dual_encoder(portable_bundle, tiny_checkpoint, tmp_path):
    lines = []
    for i, example in enumerate(built_in()[:3]):
        example.images[0].save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "text": f"a photo {i}"}))
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    dataset = load_dataset(tmp_path / "set.jsonl")
    found = compare(portable_bundle("clip"), tiny_checkpoint("clip"), dataset=dataset, store=False)
    assert found.builds[0].accuracy.examples == 6  # both ways
    assert found.builds[0].accuracy.lost == 0
    with pytest.raises(ParityError, match="answers questions"):
        compare(portable_bundle("llava-llama"), tiny_checkpoint("llava-llama"), dataset=dataset, store=False)


def test_on_a_device_nothing_imports_pytorch(llava):
    """Builds against the portable graphs, the page and bisecting included, in a process that must not have torch."""
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "matplotlib"):
            raise ImportError(name + " is not on this device")
sys.meta_path.insert(0, Refuse())
from vlm_edge.parity import bisect_bundle, compare
report = compare({str(llava)!r}, None, max_new_tokens=4)
report.to_html({str(llava.parent / "device.html")!r})
assert bisect_bundle({str(llava)!r}, None, report) == [] or report.verdict == "FAIL"
print(report.reference, [build.name for build in report.builds], report.verdict)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("portable graphs ['cpu-int8']")
    assert read_manifest(llava).builds["cpu-int8"].parity.reference == "portable graphs"


def test_what_cannot_be_compared_is_an_error(portable_bundle, tiny_checkpoint, llava):
    bare = portable_bundle("llava-llama")
    with pytest.raises(ParityError, match="no build to compare"):
        compare(bare, None)
    with pytest.raises(TargetError, match="no build 'cpu-int9'"):
        compare(llava, None, builds=["cpu-int9"])
    with pytest.raises(ParityError, match="no examples"):
        compare(llava, None, examples=[])
    with pytest.raises(ParityError, match="max_new_tokens"):
        compare(llava, None, max_new_tokens=0)
    with pytest.raises(ParityError, match=r"is a 'clip', .* was made from a 'llava'"):
        compare(bare, tiny_checkpoint("clip"), store=False)


def test_builds_for_a_gpu_are_compared_where_there_is_one(portable_bundle, tmp_path):
    """Left out, and said, where none is named; asked for by name, the missing device is an error."""
    path = copy(portable_bundle("llava-llama"), tmp_path)
    build(path, "cpu-fp32")
    build(path, "cuda-desktop")
    found = compare(path, None, max_new_tokens=2, store=False)
    assert [one.name for one in found.builds] == ["cpu-fp32"] and "Not compared: cuda-desktop" in found.note
    with pytest.raises(DeviceError, match="onnxruntime-gpu"):
        compare(path, None, builds=["cuda-desktop"], max_new_tokens=2, store=False)


def test_examples_of_ones_own(llava):
    example = Example(built_in()[0].images, "Is there a red circle?")
    found = compare(llava, None, examples=[example], max_new_tokens=2, store=False)
    assert [one.prompt for one in found.examples] == ["Is there a red circle?"]
    assert found.builds[0].logits.steps <= 2
    assert bisect_bundle(llava, None, found) == []


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'runtimes'}"}
