"""Decoders in int8 for TensorRT, weights and activations, and one word for the precision of all graphs."""

from __future__ import annotations

import shutil

import numpy as np
import onnx_ir as ir
import pytest
from engine_builds import SMS, Remembered, save, value
from onnx import TensorProto, helper

from vlm_edge.targets.backend import CompileOptions
from vlm_edge.targets.build import build
from vlm_edge.targets.examine import examine
from vlm_edge.targets.precision import nearest, parse_precision, replaced, resolve_precision, stored_as
from vlm_edge.targets.prompts import PROMPTS, decoder_feeds, drawn_pictures
from vlm_edge.targets.samples import PAST
from vlm_edge.targets.target import load_target
from vlm_edge.targets.tensorrt import builder
from vlm_edge.targets.tensorrt.network import check_network
from vlm_edge.targets.tensorrt.pipeline import decoder_thresholds
from vlm_edge.targets.tensorrt.seam import load_library
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.errors import BundleError, TargetError

NO_ENGINES = CompileOptions(context=(64,), make=False)


def test_int8_of_a_decoder_is_of_activations_on_tensorrt_alone():
    assert stored_as("decoder", "int8", "tensorrt") == stored_as("decoder", "int8", "tensorrt-rtx") == "int8"
    for backend in ("ort-cpu", "ort-cuda"):
        assert stored_as("decoder", "int8", backend) == "int8w"
    assert stored_as("head", "int8", "tensorrt") == "int8w" and stored_as("decoder", "int8w", "tensorrt") == "int8w"
    assert stored_as("decoder", "fp8", "tensorrt") == "fp8w"
    assert "int8w" in load_target("rtx-30").words["decoder"] and "int8w" not in load_target("cuda-desktop").words["decoder"]


ROLES = {"vision_encoder": "encoder", "embed_tokens": "embedding", "decoder": "decoder", "lm_head": "head", "vq": "codes"}


@pytest.mark.parametrize(
    ("target", "word", "expected"),
    [
        ("rtx-40", "int8", {"vision_encoder": "int8", "embed_tokens": "fp16", "decoder": "int8", "lm_head": "int8"}),
        ("rtx-40", "int8w", {"vision_encoder": "int8w", "embed_tokens": "fp16", "decoder": "int8w", "lm_head": "int8w"}),
        ("rtx-40", "fp8", {"vision_encoder": "fp8", "embed_tokens": "fp16", "decoder": "fp8", "lm_head": "fp8"}),
        ("rtx-40", "int4", {"vision_encoder": "int4", "embed_tokens": "fp16", "decoder": "int4", "lm_head": "int4"}),
        ("cuda-desktop", "int4", {"vision_encoder": "fp16", "embed_tokens": "fp16", "decoder": "int4", "lm_head": "int4"}),
        ("cuda-desktop", "int8", {"vision_encoder": "fp16", "embed_tokens": "fp16", "decoder": "int8", "lm_head": "int8"}),
        ("cpu-fp32", "int8", dict.fromkeys(["vision_encoder", "embed_tokens", "decoder", "lm_head"], "int8")),
    ],
)
def test_one_word_is_the_nearest_that_each_graph_can_have(target, word, expected):
    words = load_target(target).words
    found = resolve_precision(load_target(target).precision, word, ROLES, words)
    assert found == expected | {"vq": "fp32"}
    others = replaced(word, found, ROLES)
    assert others == {role: one for role, one in expected.items() if one != word}
    assert replaced(f"decoder={word}", found, ROLES) == replaced(None, found, ROLES) == {}


def test_one_word_must_be_one_that_the_decoder_can_have():
    with pytest.raises(TargetError, match="'fp8': not a precision; write one of bf16, fp16"):
        parse_precision("fp8", ROLES, load_target("rtx-30").words)
    with pytest.raises(TargetError, match="slower than fp32 on CPUs"):
        parse_precision("fp16", ROLES)
    assert parse_precision("int8", {"vq": "codes"}) == {}
    for target in ("rtx-50", "cuda-desktop", "cpu-int4", "jetson-thor"):
        words = load_target(target).words
        for kind in ("encoder", "embedding", "decoder", "head"):
            for word in {one for some in words.values() for one in some}:
                assert nearest(word, kind, words) in words[kind], "the chain ends at a word that the graph can have"


def test_the_head_of_an_int8_decoder_stays_wider_unless_asked():
    orin = load_target("jetson-orin-nano")
    assert resolve_precision(orin.precision, "decoder=int8", ROLES, orin.words)["lm_head"] == "fp16"
    assert resolve_precision(orin.precision, "decoder=int8,lm_head=int8", ROLES, orin.words)["lm_head"] == "int8"
    assert resolve_precision(orin.precision, "decoder=int8w", ROLES, orin.words)["lm_head"] == "int8w"


def test_a_product_that_lost_its_codes_is_seen(tmp_path):
    """The graph says that both sides are 8-bit, the network (of another graph) reads one of them in half precision."""
    pytest.importorskip("tensorrt_rtx")
    rtx = load_library(load_target("rtx-40"), (86,), gpu=None)
    both, one = (_product(tmp_path / f"{name}.onnx", name == "both") for name in ("both", "one"))
    log = builder._Log()
    listener = log.listener(rtx)
    maker = rtx.module.Builder(listener)
    for path, count in ((both, 1), (one, 0)):
        graph = ir.load(path)
        network, parser = builder._parsed(rtx, maker, listener, graph, path)
        assert check_network(rtx, network, graph, path).products8 == count
    with pytest.raises(TargetError, match=r"of 1 products in 8 bits 1 do not read 8-bit codes.*node 'product' \(MatMul\)"):
        check_network(rtx, network, ir.load(both), both)
    del parser


def _product(path, quantised):
    half, codes = TensorProto.FLOAT16, np.arange(64 * 64, dtype=np.int64).reshape(64, 64) % 100
    weights = {"codes": codes.astype(np.int8), "scales": np.full(64, 0.01, np.float16), "scale": np.array(0.1, np.float16)}
    weights["zero"] = np.array(0, np.int8)
    nodes = [helper.make_node("DequantizeLinear", ["codes", "scales"], ["weight"], name="weight", axis=1)]
    if quantised:
        nodes.append(helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="q"))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], name="dq"))
    nodes.append(helper.make_node("MatMul", ["dq" if quantised else "x", "weight"], ["y"], name="product"))
    return save(path, nodes, [value("x", [4, 64], half)], [value("y", [4, 64], half)], weights)


def test_drawn_pictures_differ_and_are_the_same_every_time():
    first, again = drawn_pictures(4), drawn_pictures(4)
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert len({picture.tobytes() for picture in first}) == 4


@pytest.fixture(scope="module", name="feeds")
def _feeds(portable_bundle):
    bundle = open_bundle(portable_bundle("tiny-llava"))
    return bundle, decoder_feeds(bundle, [])


def test_calibration_is_prompts_with_the_models_own_answers(feeds):
    bundle, found = feeds
    assert len(found) >= len(PROMPTS)
    entry = bundle.graphs["decoder"]
    for one in found:
        assert one.keys() == {spec.name for spec in entry.inputs}
        tokens = one["inputs_embeds"].shape[1]
        assert tokens == one["attention_mask"].shape[1] == one["position_ids"].shape[-1] > 16, "a prompt, a picture and an answer"
        np.testing.assert_array_equal(one["position_ids"].reshape(-1), np.arange(tokens))
        assert all(array.shape[2] == 0 for name, array in one.items() if name.startswith(PAST))
    assert len({one["inputs_embeds"].tobytes() for one in found}) == len(found)


def test_ranges_are_of_every_product_whatever_the_capacity(feeds):
    bundle, found = feeds
    target = load_target("rtx-30")
    ranges = decoder_thresholds(bundle, "decoder", target, found[:3])
    layers = bundle.manifest.contract.kv.layers
    assert len(ranges) >= 4 * layers and all(
        0 < one < 1e4 for one in ranges.values()
    )  # q, k, v read one value; o; gate, up; down
    shortest = min(found, key=lambda one: one["inputs_embeds"].shape[1])
    wider = decoder_thresholds(bundle, "decoder", target, [shortest])  # through a cache of fewer entries
    assert wider.keys() == ranges.keys()


@pytest.mark.parametrize(("target", "native"), [("rtx-40", True), ("jetson-orin-nano-jp62", False)])
def test_an_int8_decoder_quantises_what_its_products_read(target, native, portable_bundle, tmp_path):
    path = shutil.copytree(portable_bundle("tiny-llava"), tmp_path / "llava.vlm")
    seen = Remembered()
    made = build(path, target, precision="int8", compiling=NO_ENGINES, progress=seen, name="q")
    told = seen.steps["precision int8"]
    assert told == "vision_encoder is fp16; projector is fp16; embed_tokens is fp16", "no pictures were named"
    assert made.options["embed_tokens.asked"] == "int8" and made.precision["embed_tokens"] == "fp16"
    assert made.options["decoder.calibrated_on"] == "16 answers on drawn pictures" in seen.steps["lower decoder (int8)"]
    entry = made.graphs["decoder.c64"]
    assert entry.precision == "int8" and made.options["decoder.c64.cosine"] > 0.98
    model = ir.load(path / entry.model.file)
    products = [node for node in model.graph if node.op_type == "MatMul" and _stored(node.inputs[1])]
    body = [node for node in products if node.outputs[0].name != "logits" and "lm_head" not in str(node.name)]
    both = [node for node in body if _quantised(node.inputs[0]) and _codes(node.inputs[1]) == ir.DataType.INT8]
    layers = open_bundle(path).manifest.contract.kv.layers
    assert len(both) >= 7 * layers, [node.name for node in body if node not in both]
    for node in both:
        scale = node.inputs[1].producer().inputs[1]
        assert scale.shape is not None and len(scale.shape) == 1, "one scale per output channel"


def test_a_build_by_one_word_is_gone_on_with(portable_bundle, tmp_path):
    """The same command again, as on the device that compiles the engines, and without the pictures of the first one."""
    path = shutil.copytree(portable_bundle("tiny-llava"), tmp_path / "llava.vlm")
    picture = tmp_path / "picture.png"
    drawn_pictures(1)[0].save(picture)
    first = build(path, "rtx-40", precision="int8", calibration=[picture], compiling=NO_ENGINES, name="q")
    assert first.precision["vision_encoder"] == "int8" and first.options["decoder.calibrated_on"] == "16 answers on 1 picture"
    for precision in ("int8", None):
        again = build(path, "rtx-40", precision=precision, compiling=NO_ENGINES, name="q")
        assert again.graphs == first.graphs
    with pytest.raises(BundleError, match=r"made with another precision \(vision_encoder=int8\)"):
        build(path, "rtx-40", precision="int4", compiling=NO_ENGINES, name="q")


def _maker(value):
    """The node that makes a value, casts aside."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == "Cast":
        node = node.inputs[0].producer()
    return node


def _stored(value):
    node = _maker(value)
    return value.const_value is not None or (
        node is not None and node.op_type == "DequantizeLinear" and node.inputs[0].const_value is not None
    )


def _codes(value):
    node = _maker(value)
    return node.inputs[0].dtype if node is not None and node.op_type == "DequantizeLinear" else None


def _quantised(value):
    node = _maker(value)
    inner = _maker(node.inputs[0]) if node is not None and node.op_type == "DequantizeLinear" else None
    return inner is not None and inner.op_type == "QuantizeLinear"


def test_a_recurrent_decoder_says_what_to_choose_instead(portable_bundle, feeds):
    bundle = open_bundle(portable_bundle("show_attend_tell"))
    with pytest.raises(TargetError, match=r"decoder has a recurrent state.*choose int8w or fp16"):
        decoder_thresholds(bundle, "decoder", load_target("rtx-30"), feeds[1][:1])


def test_weights_alone_need_no_calibration(portable_bundle, tmp_path):
    path = shutil.copytree(portable_bundle("tiny-llava"), tmp_path / "llava.vlm")
    made = build(path, "rtx-40", precision="decoder=int8w", compiling=NO_ENGINES, name="w")
    model = ir.load(path / made.graphs["decoder.c64"].model.file)
    assert made.graphs["decoder.c64"].precision == "int8w" and "decoder.calibrated_on" not in made.options
    assert not [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert made.options["decoder.c64.cosine"] > 0.999


@pytest.mark.slow
def test_engines_of_an_int8_decoder_have_int8_products(portable_bundle, tmp_path):
    """TensorRT-RTX parses and compiles it for three GPUs, and the network check has seen each int8 value."""
    path = shutil.copytree(portable_bundle("tiny-llava"), tmp_path / "llava.vlm")
    seen = Remembered()
    options = CompileOptions(context=(64,), sm=SMS)
    made = build(path, "rtx-40", precision="decoder=int8", compiling=options, progress=seen, name="q")
    (engine,) = (one for one in made.engines if one.role == "decoder")
    assert engine.sm == list(SMS) and not [detail for detail in seen.engines().values() if "remark" in detail]
    products = 7 * open_bundle(path).manifest.contract.kv.layers
    assert f"{products} products in 8 bits" in seen.engines()["decoder.c64"]


def test_preflight_means_the_same_by_one_word(portable_bundle):
    seen = Remembered()
    found = examine(portable_bundle("tiny-llava"), "rtx-40", precision="int8", context=64, progress=seen)
    assert "vision_encoder is fp16" in seen.steps["precision int8"] and not found.problems
    assert {"examine vision_encoder (fp16)", "examine decoder (int8)"} <= seen.steps.keys()
