"""A bundle is whole or it is not there; whatever is wrong with it is said in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm_edge_runtime.bundle.manifest import (
    Build,
    DualEncoderContract,
    GraphEntry,
    Manifest,
    SoftmaxSimilarity,
    Source,
    TensorSpec,
)
from vlm_edge_runtime.bundle.reader import MANIFEST, open_bundle, read_manifest
from vlm_edge_runtime.bundle.writer import BuildWriter, BundleWriter, now, update_manifest
from vlm_edge_runtime.errors import BundleError, TargetError


def _entry(writer, file: str) -> GraphEntry:
    spec = TensorSpec(name="pixel_values", dtype="float32", shape=("images", 3, 8, 8))
    out = TensorSpec(name="image_embeds", dtype="float32", shape=("images", 4))
    return GraphEntry(role="vision_encoder", model=writer.ref(file), inputs=[spec], outputs=[out])


def _manifest(writer) -> Manifest:
    contract = DualEncoderContract(
        embedding_dim=4,
        similarity=SoftmaxSimilarity(logit_scale=10.0),
        text_length=8,
        text_padding="longest",
        pad_token_id=0,
    )
    return Manifest(
        name="toy",
        model_type="clip",
        source=Source(name="toy", revision="0", architecture="CLIPModel"),
        versions={},
        created=now(),
        contract=contract,
        files=[writer.ref("config.json")],
        graphs={"vision_encoder": _entry(writer, "portable/vision_encoder.onnx")},
    )


@pytest.fixture
def bundle(tmp_path) -> Path:
    out = tmp_path / "toy.vlm"
    with BundleWriter(out) as writer:
        (writer.path / "portable").mkdir()
        (writer.path / "portable/vision_encoder.onnx").write_bytes(b"portable graph")
        (writer.path / "config.json").write_text("{}")
        writer.commit(_manifest(writer))
    return out


def _build(bundle: Path, content: bytes = b"lowered graph", overwrite: bool = False) -> None:
    with BuildWriter(bundle, "cpu-int4", overwrite=overwrite) as writer:
        (writer.path / "vision_encoder.onnx").write_bytes(content)
        graphs = {"vision_encoder": _entry(writer, "vision_encoder.onnx")}
        writer.commit(Build(name="cpu-int4", target="cpu-int4", backend="ort-cpu", precision={}, graphs=graphs))


def test_what_was_written_is_read_back(bundle):
    opened = open_bundle(bundle)
    assert opened.manifest.family == "dual_encoder"
    assert opened.graph_path("vision_encoder").read_bytes() == b"portable graph"
    assert opened.read_json("config.json") == {}
    assert opened.build_name == "portable"
    assert [p.name for p in bundle.parent.iterdir()] == ["toy.vlm"]


def test_a_build_replaces_the_portable_graph_of_its_role(bundle):
    _build(bundle)
    assert open_bundle(bundle).graph_path("vision_encoder").read_bytes() == b"portable graph"
    assert open_bundle(bundle, build="cpu-int4").graph_path("vision_encoder").read_bytes() == b"lowered graph"
    with pytest.raises(BundleError, match="exists already"):
        _build(bundle)
    _build(bundle, b"second", overwrite=True)
    assert open_bundle(bundle, build="cpu-int4").graph_path("vision_encoder").read_bytes() == b"second"
    assert sorted(p.name for p in (bundle / "builds").iterdir()) == ["cpu-int4"]


def test_an_unknown_build_names_what_is_there(bundle):
    with pytest.raises(TargetError, match=r"no build 'cpu-int8'; it has: portable\. Make it with `vlm-edge build"):
        open_bundle(bundle, build="cpu-int8")


def test_an_unknown_graph_names_what_is_there(bundle):
    with pytest.raises(BundleError, match="no graph 'decoder'; it has: vision_encoder"):
        open_bundle(bundle).graph_path("decoder")


def test_a_missing_file(bundle):
    (bundle / "portable/vision_encoder.onnx").unlink()
    with pytest.raises(BundleError, match=r"vision_encoder\.onnx is missing"):
        open_bundle(bundle)


def test_a_truncated_file_is_found_even_without_hashing(bundle):
    (bundle / "portable/vision_encoder.onnx").write_bytes(b"port")
    with pytest.raises(BundleError, match="truncated: 4 bytes, the manifest says 14"):
        open_bundle(bundle, verify=False)


def test_a_changed_file(bundle):
    (bundle / "portable/vision_encoder.onnx").write_bytes(b"portable grapH")
    with pytest.raises(BundleError, match="SHA-256"):
        open_bundle(bundle)
    open_bundle(bundle, verify=False)


def test_a_build_with_damage_does_not_stop_the_portable_graphs(bundle):
    _build(bundle)
    (bundle / "builds/cpu-int4/vision_encoder.onnx").unlink()
    open_bundle(bundle)
    with pytest.raises(BundleError, match="missing"):
        open_bundle(bundle, build="cpu-int4")


@pytest.mark.parametrize("folder", ["nothing", ""])
def test_not_a_bundle(tmp_path, folder):
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(tmp_path / folder)


def _edit(bundle: Path, **changes: object) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**data, **changes}))


def test_a_newer_schema_is_refused(bundle):
    _edit(bundle, schema_version=99, something_new=True)
    with pytest.raises(BundleError, match="schema version 99, this vlm-edge reads up to"):
        open_bundle(bundle)


def test_an_unknown_key_is_refused(bundle):
    _edit(bundle, merge="other")
    with pytest.raises(BundleError, match=r"does not follow schema 3: .*merge"):
        open_bundle(bundle)


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": 3, "family": tru}', '{"family": "\\ud800"}'])
def test_a_damaged_manifest(bundle, text):
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match="not valid JSON"):
        open_bundle(bundle)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"text"'])
def test_json_that_is_no_manifest(bundle, text):
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=r"is JSON, but no manifest \(Expected `object`"):
        open_bundle(bundle)


@pytest.mark.parametrize("key", ["schema_version", "created"])
def test_letters_that_are_not_utf_8_are_no_json_wherever_they_stand(bundle, key):
    data = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_bytes(json.dumps({**data, key: "@"}).encode().replace(b'"@"', b'"\xff"'))
    with pytest.raises(BundleError, match=r"is not valid JSON \('utf-8' codec"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_manifest_cannot_point_outside(bundle, name):
    data = json.loads((bundle / MANIFEST).read_text())
    data["files"][0]["file"] = name
    (bundle / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="outside the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, BundleError])
def test_an_interrupted_bundle_leaves_nothing(tmp_path, error):
    def write() -> None:
        with BundleWriter(tmp_path / "toy.vlm") as writer:
            (writer.path / "half").write_bytes(b"x")
            raise error("stop")

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_leaves_the_bundle_as_it_was(bundle):
    before = sorted(str(p) for p in bundle.rglob("*"))

    def write() -> None:
        with BuildWriter(bundle, "cpu-int4") as writer:
            (writer.path / "half").write_bytes(b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert sorted(str(p) for p in bundle.rglob("*")) == before


def test_an_existing_bundle_is_not_replaced_unasked(bundle):
    with pytest.raises(BundleError, match="--overwrite"):
        BundleWriter(bundle)


def test_overwriting_replaces_the_bundle_whole(bundle):
    _build(bundle)
    with BundleWriter(bundle, overwrite=True) as writer:
        (writer.path / "portable").mkdir()
        (writer.path / "portable/vision_encoder.onnx").write_bytes(b"newer")
        (writer.path / "config.json").write_text("{}")
        writer.commit(_manifest(writer))
    assert not (bundle / "builds").exists()
    assert open_bundle(bundle).graph_path("vision_encoder").read_bytes() == b"newer"
    assert [p.name for p in bundle.parent.iterdir()] == ["toy.vlm"]


def test_update_manifest_is_whole_or_not_at_all(bundle):
    def rename(manifest: Manifest) -> None:
        manifest.name = "renamed"

    update_manifest(bundle, rename)
    assert read_manifest(bundle).name == "renamed"

    def fail(manifest: Manifest) -> None:
        manifest.name = "never"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        update_manifest(bundle, fail)
    assert read_manifest(bundle).name == "renamed"
    assert not list(bundle.glob(".manifest*"))
