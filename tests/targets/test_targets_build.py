"""Building a whole bundle for the CPU targets."""

import dataclasses
import errno
import hashlib
import json
import shutil

import numpy as np
import onnx_ir as ir
import pytest
from graph_targets import graph_target
from sketch_bundle import SHAPE, embedding, encoder, projector_contract, write_bundle
from small_decoder import decoder, feeds
from small_graphs import largest_difference

from vlm_edge.targets.build import build
from vlm_edge.targets.native import build as native_build
from vlm_edge.targets.samples import run_graph, session
from vlm_edge_runtime.bundle.reader import open_bundle, read_manifest
from vlm_edge_runtime.errors import BundleError, TargetError


def contents(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.mark.parametrize("kernels", ["native", "onnxruntime"])
def test_fp32(vlm_bundle, kernels):
    made = build(vlm_bundle, "cpu-fp32" if kernels == "native" else graph_target("cpu-fp32"))
    changed = {"vision_encoder", "decoder"} | ({"projector", "embed_tokens"} if kernels == "native" else set())
    assert set(made.graphs) == changed, "graphs that no pass changes are taken from portable/"
    assert {entry.format for entry in made.graphs.values()} == {"plan" if kernels == "native" else "onnx"}
    assert made.kv.shared_buffer and made.backend == "ort-cpu" and made.precision["lm_head"] == "fp32"
    assert made.options["decoder.relative"] <= 1e-4 and made.options["vision_encoder.relative"] <= 1e-4
    opened = open_bundle(vlm_bundle, build="cpu-fp32")
    assert opened.build == made == read_manifest(vlm_bundle).builds["cpu-fp32"]
    assert (opened.graph_path("projector").parent.name == "portable") == (kernels == "onnxruntime")
    portable, lowered = feeds(SHAPE, sequence=5, past=7)
    wanted = run_graph(session(open_bundle(vlm_bundle).graph_path("decoder")), portable)
    found = run_graph(session(opened.graph_path("decoder")), lowered)
    assert largest_difference(found["logits"], wanted["logits"][:, -1:]) <= 1e-4


@pytest.mark.parametrize("kernels", ["native", "onnxruntime"])
def test_recorded_signature_is_the_graphs(vlm_bundle, kernels):
    made = build(vlm_bundle, "cpu-int4" if kernels == "native" else graph_target("cpu-int4"))
    assert made.options.get("decoder.kernels", "onnxruntime") == kernels
    assert made.graphs["decoder"].format == ("plan" if kernels == "native" else "onnx")
    opened = open_bundle(vlm_bundle, build="cpu-int4")
    for role, entry in made.graphs.items():
        graph = session(opened.graph_path(role))
        for specs, values in ((entry.inputs, graph.get_inputs()), (entry.outputs, graph.get_outputs())):
            assert [(spec.name, list(spec.shape)) for spec in specs] == [(value.name, list(value.shape)) for value in values]
        assert entry.nodes > 0 and entry.parameters > 0
        if entry.format == "onnx":
            assert entry.nodes == len(list(ir.load(opened.graph_path(role)).graph))
    names = [spec.name for spec in made.graphs["decoder"].inputs]
    assert names[:4] == ["inputs_embeds", "position_ids", "seqlens_k", "total_sequence_length"]


@pytest.mark.parametrize("target,stored", [("cpu-int4", "int4"), ("cpu-int8", "int8w")])
def test_quantised(vlm_bundle, target, stored):
    for chosen in (target, graph_target(target)):
        made = build(vlm_bundle, chosen, overwrite=True)
        assert {role: entry.precision for role, entry in made.graphs.items()} == {
            "vision_encoder": "int8",
            "projector": "int8",
            "embed_tokens": "int8" if target == "cpu-int4" else "fp16",
            "decoder": stored,
        }
        assert all(made.options[f"{role}.cosine"] > 0.9 for role in made.graphs)
    model = ir.load(open_bundle(vlm_bundle, build=target).graph_path("decoder"))
    bits = [node.attributes["bits"].as_int() for node in model.graph if node.op_type == "MatMulNBits"]
    assert bits[-1] == 8 and set(bits[:-1]) == {4 if target == "cpu-int4" else 8}
    assert not [node for node in model.graph if node.op_type == "MatMul"]


def test_each_graph_by_itself(vlm_bundle):
    made = build(vlm_bundle, "cpu-fp32", precision="vision=int8,decoder=int4,lm_head=fp32", block_size=16, name="mixed")
    assert made.name == "mixed" and made.target == "cpu-fp32"
    assert made.precision == {
        "vision_encoder": "int8",
        "projector": "fp32",
        "embed_tokens": "fp32",
        "decoder": "int4",
        "lm_head": "fp32",
    }
    assert made.options["decoder.kernels"] == "onnxruntime: no native kernel for 4-bit weights in blocks of 16"
    graph = ir.load(open_bundle(vlm_bundle, build="mixed").graph_path("decoder")).graph
    assert [node.op_type for node in graph].count("MatMul") == 1, "the head stays fp32"
    assert {node.attributes["block_size"].as_int() for node in graph if node.op_type == "MatMulNBits"} == {16}


def test_a_decoder_that_no_shared_buffer_fits(tmp_path):
    """Its mask is none the fused kernel draws: the cache grows as in the portable graph, and the build says so."""
    shape = dataclasses.replace(SHAPE, mask="prefix")
    graphs = {"embed_tokens": embedding(shape.vocab, shape.width), "decoder": decoder(shape)}
    contract = projector_contract(shape)
    contract.modalities = []
    path = write_bundle(tmp_path / "prefix.vlm", graphs, contract)
    for target in ("cpu-fp32", "cpu-int4"):
        made = build(path, target)
        assert not made.kv.shared_buffer and made.options["decoder.kv_cache"] == "growing"
        assert "attention_mask" in [spec.name for spec in made.graphs["decoder"].inputs]
        notes = json.loads((path / "builds" / target / "report.json").read_text())["decoder"]["passes"][-1]["notes"]
        assert "the cache grows at every token" in notes[0] and "prefix mask" in notes[0]
    assert "decoder" in made.graphs and made.graphs["decoder"].precision == "int4"


def test_same_input_same_bytes(vlm_bundle):
    build(vlm_bundle, "cpu-int4", name="one")
    build(vlm_bundle, "cpu-int4", name="two")
    assert contents(vlm_bundle / "builds" / "one") == contents(vlm_bundle / "builds" / "two")


def test_report_says_what_changed(vlm_bundle):
    build(vlm_bundle, "cpu-int4")
    report = json.loads((vlm_bundle / "builds" / "cpu-int4" / "report.json").read_text())
    passes = {one["pass"]: one["changes"] for one in report["decoder"]["passes"]}
    assert passes["group_query_attention"]["Attention → GroupQueryAttention"] == SHAPE.layers
    assert passes["weight_only_matmul"]["int4 block 32"] == 5 * SHAPE.layers


def test_dual_encoder(dual_bundle):
    made = build(dual_bundle, "cpu-int8")
    assert {role: entry.precision for role, entry in made.graphs.items()} == {"vision_encoder": "int8", "text_encoder": "int8"}
    assert made.kv is None and "decoder" not in made.precision and "lm_head" not in made.precision
    mixed = build(dual_bundle, "cpu-fp32", precision="vision=int4,text=fp32", name="mixed")
    assert set(mixed.graphs) == {"vision_encoder"}, "the text encoder has nothing to lower in fp32"


def test_a_name_is_taken_once(vlm_bundle):
    build(vlm_bundle, "cpu-fp32")
    with pytest.raises(BundleError, match="exists already"):
        build(vlm_bundle, "cpu-fp32")
    assert build(vlm_bundle, "cpu-fp32", overwrite=True).name == "cpu-fp32"


@pytest.mark.parametrize(
    "options,message",
    [
        ({"target": "cpu-int2"}, "Did you mean"),
        ({"target": "cpu-int4", "precision": "decoder=fp16"}, "cannot be 'fp16'"),
        ({"target": "cpu-int4", "block_size": 48}, "block size 48"),
        ({"target": "cpu-int4", "name": "../out"}, "cannot be a build's name"),
        ({"target": "cpu-int4", "name": "portable"}, "cannot be a build's name"),
    ],
)
def test_bad_requests(vlm_bundle, options, message):
    before = contents(vlm_bundle)
    with pytest.raises(TargetError, match=message):
        build(vlm_bundle, **options)
    assert contents(vlm_bundle) == before


def test_damage_is_found_before_anything_is_built(vlm_bundle):
    data = vlm_bundle / "portable" / "decoder.onnx.data"
    data.write_bytes(data.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(BundleError, match="SHA-256"):
        build(vlm_bundle, "cpu-fp32")
    assert not (vlm_bundle / "builds").exists()


def test_a_wrong_lowering_is_caught(vlm_bundle, monkeypatch):
    """A pass that changes what a graph computes must not get into a bundle."""
    from vlm_edge.passes.fuse_skip_norm import FuseSkipNorm

    def spoiled(self, model, original=FuseSkipNorm.apply):
        changes = original(self, model)
        for node in model.graph:
            if "epsilon" in node.attributes:
                node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)
        return changes

    monkeypatch.setattr(FuseSkipNorm, "apply", spoiled)
    before = contents(vlm_bundle)
    with pytest.raises(TargetError, match="lowering changed what"):
        build(vlm_bundle, "cpu-fp32")
    assert contents(vlm_bundle) == before


def test_interrupted_build_leaves_nothing(vlm_bundle):
    class Impatient:
        def start(self, step, total=None):
            if "decoder" in step:
                raise KeyboardInterrupt

        def advance(self, step, amount=1.0): ...

        def done(self, step, detail=""): ...

        def failed(self, step, reason): ...

    before = contents(vlm_bundle)
    with pytest.raises(KeyboardInterrupt):
        build(vlm_bundle, "cpu-int4", progress=Impatient())
    assert contents(vlm_bundle) == before and not (vlm_bundle / "builds").exists()


def test_weights_that_are_not_numbers_stay_fp32_and_are_named(vlm_bundle, tmp_path):
    broken = encoder("image_hidden_states")
    array = broken.graph.initializers["fc1.weight"].const_value.numpy().copy()
    array[0, 0] = np.nan
    broken.graph.initializers["fc1.weight"].const_value = ir.tensor(array, name="fc1.weight")
    shutil.rmtree(vlm_bundle)
    path = write_bundle(tmp_path / "nan.vlm", {"vision_encoder": broken}, projector_contract())
    with pytest.raises(TargetError, match="NaN or infinity"):
        build(path, "cpu-int8")


@pytest.mark.parametrize("kernels", ["native", "onnxruntime"])
def test_full_disk(vlm_bundle, monkeypatch, kernels):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(native_build, "write", full) if kernels == "native" else monkeypatch.setattr(ir, "save", full)
    before = contents(vlm_bundle)
    with pytest.raises(BundleError, match="no space left"):
        build(vlm_bundle, "cpu-int4" if kernels == "native" else graph_target("cpu-int4"))
    assert contents(vlm_bundle) == before and not (vlm_bundle / "builds").exists()
