"""Plans of encoders: what they compute beside the portable graph, on any number of threads and images, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from damaged_plans import PARTS, refused, survives

from vlm_edge.targets.build import build
from vlm_edge.targets.native.encoder import EncoderCompiler
from vlm_edge.targets.native.errors import NotExpressible
from vlm_edge.targets.native.plan_file import Buffer, BufferKind, GraphKind, Ref, Step, Unary, write
from vlm_edge.targets.native.session import PlanSession
from vlm_edge.targets.pipeline import lower_encoder
from vlm_edge.targets.samples import Samples, modality_feeds, run_graph, session
from vlm_edge.targets.selfcheck import FP32_TOLERANCE, Difference
from vlm_edge.targets.target import load_target
from vlm_edge_runtime import _native, load
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.errors import DeviceError

TRAINED = ["tiny-llava", "tiny-smolvlm", "tiny-clip", "tiny-paligemma"]
NAMES = ["tiny-llava", "tiny-smolvlm", "tiny-clip"]
MORE = [
    "siglip",
    "clip",
    "paligemma",
    "internvl",
    "blip2-opt",
    "blip-vqa",
    "llava_next",
    "llava-qwen2",
    "llava_onevision",
    "idefics",
    "idefics3",
    "gemma3",
    "git",
    "vit-gpt2",
    "deit-trocr",
    "janus",
    "vipllava",
    "minigpt_v2",
    "coca",
]
"""Class and distillation tokens, layer scales, features of several layers, learned queries, pooling by attention, merging;

windows averaged (Gemma 3), an attention in Einstein's notation (IDEFICS), one whose scores are scaled (CoCa).
"""


def lowered(path: Path, role: str, precision: str = "fp32") -> ir.Model:
    model = ir.load(open_bundle(path).graph_path(role))
    lower_encoder(model, precision=precision)
    return model


def planned(path: Path, role: str, out: Path, precision: str = "fp32") -> Path:
    integer = precision == "int8"
    write(EncoderCompiler(lowered(path, role, "fp32" if integer else precision), integer=integer).compile(), out)
    return out


def roles(path: Path) -> list[str]:
    known = ("vision_encoder", "qformer", "projector", "resampler", "contrast_head")
    return [role for role in open_bundle(path).graphs if role in known]


def exact(path: Path, out: Path) -> None:
    bundle = open_bundle(path)
    samples = Samples(bundle)
    for role in roles(path):
        plan = PlanSession(planned(path, role, out / f"{role}.plan"))
        difference = Difference()
        for images in (1, 3):
            feeds = samples.inputs(role, rows=images)
            wanted, found = run_graph(session(bundle.graph_path(role)), feeds), run_graph(plan, feeds)
            for name, value in wanted.items():
                difference.add(found[name], value)
        assert difference.relative < FP32_TOLERANCE, role


@pytest.mark.parametrize("name", NAMES)
def test_plan_computes_what_the_portable_graph_computes(portable_bundle, name, tmp_path):
    exact(portable_bundle(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_plans_of_other_towers(portable_bundle, name, tmp_path):
    exact(portable_bundle(name), tmp_path)


def cosine(found: np.ndarray, wanted: np.ndarray) -> float:
    left, right = found.astype(np.float64).reshape(-1), wanted.astype(np.float64).reshape(-1)
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("precision", ["int8", "int8w"])
def test_eight_bits_stay_close_on_trained_models(portable_bundle, name, precision, tmp_path):
    path = portable_bundle(name)
    bundle = open_bundle(path)
    plan = PlanSession(planned(path, "vision_encoder", tmp_path / "v.plan", precision))
    feeds = Samples(bundle).inputs("vision_encoder", rows=2)
    wanted = run_graph(session(bundle.graph_path("vision_encoder")), feeds)
    for key, value in run_graph(plan, feeds).items():
        assert cosine(value, wanted[key]) > 0.999, key


@pytest.mark.parametrize("precision", ["int8", "int4", "fp32"])
def test_threads_change_no_bit_and_neighbours_nothing(portable_bundle, precision, tmp_path):
    path = portable_bundle("tiny-llava")
    plan = planned(path, "vision_encoder", tmp_path / "v.plan", precision)
    feeds = Samples(open_bundle(path)).inputs("vision_encoder", rows=5)
    wanted = run_graph(PlanSession(plan), feeds)
    for threads in range(2, 9):
        several = PlanSession(plan, threads=threads)
        for name, array in run_graph(several, feeds).items():
            np.testing.assert_array_equal(array, wanted[name], err_msg=f"{threads} threads")
    alone = run_graph(PlanSession(plan), {name: array[2:3] for name, array in feeds.items()})
    for name, array in alone.items():
        if precision == "int8":
            np.testing.assert_array_equal(array, wanted[name][2:3])
        else:  # a row of floats adds up in an order of its own where it is alone in a tile
            assert np.abs(array - wanted[name][2:3]).max() < FP32_TOLERANCE * np.abs(array).max()


def test_products_that_are_run_as_one_give_the_same_bits(portable_bundle, tmp_path):
    """Up, activation, 8 bits and down take some rows at a time; where something else reads what lies between, they are steps."""
    path = portable_bundle("tiny-smolvlm")
    chained = EncoderCompiler(lowered(path, "vision_encoder"), integer=True).compile()
    kinds = [step.kind for step in chained.steps]
    wanted = [GraphKind.MATMUL, GraphKind.QUANTIZE, GraphKind.MATMUL]
    places = [index for index in range(len(kinds)) if kinds[index : index + 3] == wanted]
    assert places
    write(chained, tmp_path / "chained.plan")
    for index in places:
        between = chained.steps[index].outputs[0]
        assert between is not None
        spare = Buffer(BufferKind.FLOATS, between.buffer.width, rows=between.buffer.rows)
        reals = [1.0, 1.0]
        chained.steps.append(Step(GraphKind.UNARY, spare.width, False, [between], [Ref(spare)], [], [int(Unary.IDENTITY)], reals))
    write(chained, tmp_path / "apart.plan")
    feeds = Samples(open_bundle(path)).inputs("vision_encoder", rows=3)
    for kernels in _native.kernels():
        for threads in (1, 3):
            runs = [
                run_graph(PlanSession(tmp_path / f"{name}.plan", threads=threads, kernels=kernels), feeds)
                for name in ("chained", "apart")
            ]
            for name, array in runs[0].items():
                np.testing.assert_array_equal(array, runs[1][name], err_msg=f"{kernels}, {threads} threads")


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_instruction_sets_agree(portable_bundle, precision, tmp_path):
    path = portable_bundle("tiny-smolvlm")
    plan = planned(path, "vision_encoder", tmp_path / "v.plan", precision)
    feeds = Samples(open_bundle(path)).inputs("vision_encoder", rows=1)
    plain = run_graph(PlanSession(plan, kernels="scalar"), feeds)
    for name in _native.kernels():
        for key, array in run_graph(PlanSession(plan, kernels=name), feeds).items():
            assert cosine(array, plain[key]) > (0.9999 if precision == "int8" else 1 - 1e-9), name


def test_only_what_is_computed_has_steps(portable_bundle, tmp_path):
    """Patches, class token and choice of tokens are copies; queries, keys and values are one product; sums are taken in."""
    path = portable_bundle("tiny-llava")
    kinds = [step.kind for step in EncoderCompiler(lowered(path, "vision_encoder"), integer=True).compile().steps]
    layers = kinds.count(GraphKind.ATTENTION)
    assert kinds.count(GraphKind.MATMUL) == 1 + 4 * layers
    assert kinds.count(GraphKind.ADD) == 1, "positions"
    assert kinds.count(GraphKind.COPY) == 4, "patches; class token and patches into one buffer; the chosen tokens"


def test_a_wrong_scale_would_be_seen(portable_bundle, tmp_path):
    path = portable_bundle("tiny-clip")
    model = lowered(path, "vision_encoder")
    plan = EncoderCompiler(model).compile()
    for step in plan.steps:
        if step.kind == GraphKind.ATTENTION:
            step.reals = [2 * step.reals[0]]
    write(plan, tmp_path / "v.plan")
    feeds = Samples(open_bundle(path)).inputs("vision_encoder", rows=1)
    wanted = run_graph(session(open_bundle(path).graph_path("vision_encoder")), feeds)
    difference = Difference()
    for name, value in run_graph(PlanSession(tmp_path / "v.plan"), feeds).items():
        difference.add(value, wanted[name])
    assert difference.relative > 10 * FP32_TOLERANCE


def test_an_unknown_operation_is_named(portable_bundle):
    model = lowered(portable_bundle("tiny-smolvlm"), "vision_encoder")
    next(node for node in model.graph if node.op_type == "Gelu").op_type = "Erf"
    with pytest.raises(NotExpressible, match="Erf"):
        EncoderCompiler(model).compile()


def test_a_build_has_plans_and_says_why_not(portable_bundle, tmp_path, scene):
    picture, _ = scene
    path = shutil.copytree(portable_bundle("tiny-clip"), tmp_path / "clip.vlm")
    target = load_target("cpu-int8")
    options = msgspec.structs.replace(target.options, encoder_kernels="native")
    made = build(path, msgspec.structs.replace(target, options=options), name="native")
    assert made.options["vision_encoder.kernels"] == "native"
    assert made.options["text_encoder.kernels"] == "native"
    assert made.graphs["vision_encoder"].format == "plan"
    assert not (path / "builds" / "native" / "vision_encoder.onnx").exists()
    with load(path, build="native") as native, load(path, build="portable") as portable:
        left, right = (one.embed_image([str(picture), str(picture)]) for one in (native, portable))
    assert left.shape == right.shape
    assert cosine(left, right) > 0.999


def test_a_build_says_what_calibration_pictures_are_for(portable_bundle, tmp_path, scene):
    """They bring a plan closer, and are not needed; which pictures it was tried on is not told by it."""
    picture, _ = scene
    path = shutil.copytree(portable_bundle("tiny-llava"), tmp_path / "llava.vlm")
    made = build(path, "cpu-int8", calibration=[picture], name="seen")
    assert "means" in str(made.options["vision_encoder.calibration"]) and made.graphs["vision_encoder"].format == "plan"
    plain = build(path, "cpu-int8", name="plain")
    assert "vision_encoder.calibration" not in plain.options
    bundle = open_bundle(path)
    (feeds,) = modality_feeds(bundle, "vision_encoder", [picture])
    ((_, wanted),) = run_graph(session(bundle.graph_path("vision_encoder")), feeds).items()
    far = []
    for name in ("seen", "plain"):
        ((_, found),) = run_graph(session(open_bundle(path, build=name).graph_path("vision_encoder")), feeds).items()
        far.append(1 - cosine(found, wanted))
    assert far[0] < far[1] < 1e-3


def test_arrays_that_do_not_fit_are_refused(portable_bundle, tmp_path):
    plan = planned(portable_bundle("tiny-clip"), "vision_encoder", tmp_path / "v.plan")
    opened = _native.Session(str(plan), "vision_encoder", plan=True)
    ((given, _, shape),), ((made, _, out),) = opened.inputs, opened.outputs
    pixels, embeds = np.zeros((1, *shape[1:]), np.float32), np.zeros((1, *out[1:]), np.float32)
    with pytest.raises(DeviceError, match="missing"):
        _native.graph_run(opened, {}, {made: embeds})
    with pytest.raises(DeviceError, match="dimension 2"):
        _native.graph_run(opened, {given: pixels[:, :, 1:].copy()}, {made: embeds})
    with pytest.raises(DeviceError, match="images"):
        _native.graph_run(opened, {given: pixels}, {made: np.zeros((2, *out[1:]), np.float32)})
    with pytest.raises(TypeError, match="float32"):
        _native.graph_run(opened, {given: pixels.astype(np.float64)}, {made: embeds})
    _native.graph_run(opened, {given: pixels[:0]}, {made: embeds[:0]})


@pytest.mark.parametrize("part", PARTS)
def test_damaged_plans_of_graphs_are_refused(portable_bundle, tmp_path, part):
    refused(planned(portable_bundle("tiny-clip"), "vision_encoder", tmp_path / "v.plan", "int8"), part)


@pytest.mark.parametrize("precision", ["int8", "int4", "fp32"])
def test_no_single_wrong_byte_makes_a_graph_read_beyond_its_memory(portable_bundle, tmp_path, precision):
    """Refused, or it runs (a wrong number in it may only give wrong numbers)."""
    feeds = Samples(open_bundle(portable_bundle("tiny-clip"))).inputs("vision_encoder", rows=2)
    survives(planned(portable_bundle("tiny-clip"), "vision_encoder", tmp_path / "v.plan", precision), feeds, 100)


def test_a_decoder_does_not_take_it(portable_bundle, tmp_path):
    plan = planned(portable_bundle("tiny-clip"), "vision_encoder", tmp_path / "v.plan")
    opened = _native.Session(str(plan), "decoder", plan=True)
    with pytest.raises(TypeError, match="decoder's plan"):
        _native.plan_step(opened, {})
    with pytest.raises(DeviceError):
        _native.DecoderState(opened, opened, 1, 8, 0)
