"""Plans of encoders over the patches of one picture: any size, windows, positions, mergers; what a call may not ask of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from damaged_plans import survives
from PIL import Image

from vlm_edge.targets.build import build
from vlm_edge.targets.native.encoder import EncoderCompiler
from vlm_edge.targets.native.errors import NotExpressible
from vlm_edge.targets.native.plan_file import GraphKind, Over, Plan, write
from vlm_edge.targets.native.session import PlanSession
from vlm_edge.targets.pipeline import lower_encoder
from vlm_edge.targets.samples import Feeds, modality_feeds, run_graph, session
from vlm_edge.targets.selfcheck import FP32_TOLERANCE, Difference
from vlm_edge_runtime import _native
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.errors import DeviceError

ROLES = ("vision_encoder", "projector")
NAMES = ["qwen2_vl", "qwen2_5_vl", "mistral3"]
MORE = ["qwen3_vl", "pixtral"]
SIZES = [(64, 48), (40, 200), (32, 32)]


def drawn(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3)).astype(np.uint8))


def pictures(path: Path, role: str) -> Iterator[Feeds]:
    """What the graph takes for pictures of several sizes."""
    return modality_feeds(open_bundle(path), role, [drawn(*size) for size in SIZES])


def lowered(path: Path, role: str, precision: str = "fp32") -> ir.Model:
    model = ir.load(open_bundle(path).graph_path(role))
    lower_encoder(model, precision="fp32" if precision == "int8" else precision)
    return model


def compiled(path: Path, role: str, precision: str = "fp32") -> Plan:
    return EncoderCompiler(lowered(path, role, precision), integer=precision == "int8").compile()


def planned(path: Path, role: str, out: Path, precision: str = "fp32") -> Path:
    write(compiled(path, role, precision), out)
    return out


def difference(plan: Path, path: Path, role: str) -> float:
    found, opened, portable = Difference(), PlanSession(plan, threads=2), session(open_bundle(path).graph_path(role))
    rows = set()
    for feeds in pictures(path, role):
        wanted, made = run_graph(portable, feeds), run_graph(opened, feeds)
        rows.add(len(next(iter(feeds.values()))))
        for name, value in wanted.items():
            found.add(made[name], value)
    assert len(rows) > 1
    return found.relative


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_any_size_as_the_portable_graph_has_them(portable_bundle, name, tmp_path):
    for role in ROLES:
        plan = planned(portable_bundle(name), role, tmp_path / f"{role}.plan")
        assert difference(plan, portable_bundle(name), role) < FP32_TOLERANCE, role


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_other_towers(portable_bundle, name, tmp_path):
    for role in ROLES:
        plan = planned(portable_bundle(name), role, tmp_path / f"{role}.plan")
        assert difference(plan, portable_bundle(name), role) < FP32_TOLERANCE, role


def cosine(found: np.ndarray, wanted: np.ndarray) -> float:
    left, right = found.astype(np.float64).reshape(-1), wanted.astype(np.float64).reshape(-1)
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        (name, precision)
        if name in NAMES[:1] or (name in NAMES and precision == "int8")
        else pytest.param(name, precision, marks=pytest.mark.slow)
        for name in NAMES + MORE
        for precision in ("int8", "int8w", "int4")
    ],
)
def test_weights_in_fewer_bits(portable_bundle, name, precision, tmp_path):
    """Beside the same weights in floats: those of ONNX Runtime in 4 and 8 bits per block, whose activations have 8 bits too."""
    path = portable_bundle(name)
    for role in ROLES:
        opened = PlanSession(planned(path, role, tmp_path / f"{role}.plan", precision), threads=2)
        model = lowered(path, role, "fp32" if precision == "int8" else precision)
        ir.save(model, tmp_path / f"{role}.onnx", external_data=f"{role}.data")
        other = session(tmp_path / f"{role}.onnx")
        for feeds in pictures(path, role):
            wanted = run_graph(other, feeds)
            for key, value in run_graph(opened, feeds).items():
                assert cosine(value, wanted[key]) > (0.998 if precision == "int8" else 0.9995), (role, key)


@pytest.mark.parametrize("precision", ["int8", "int4", "fp32"])
def test_threads_change_no_bit(portable_bundle, precision, tmp_path):
    path = portable_bundle("qwen2_5_vl")
    plan = planned(path, "vision_encoder", tmp_path / "v.plan", precision)
    for feeds in pictures(path, "vision_encoder"):
        wanted = run_graph(PlanSession(plan), feeds)
        for threads in (2, 3, 8):
            for name, array in run_graph(PlanSession(plan, threads=threads), feeds).items():
                np.testing.assert_array_equal(array, wanted[name], err_msg=f"{threads} threads")


@pytest.mark.parametrize("name", NAMES)
def test_instruction_sets_agree(portable_bundle, name, tmp_path):
    path = portable_bundle(name)
    plan = planned(path, "vision_encoder", tmp_path / "v.plan")
    feeds = next(pictures(path, "vision_encoder"))
    plain = run_graph(PlanSession(plan, kernels="scalar"), feeds)
    for kernels in _native.kernels():
        for key, array in run_graph(PlanSession(plan, kernels=kernels), feeds).items():
            assert cosine(array, plain[key]) > 1 - 1e-9, kernels


def test_only_what_is_computed_has_steps(portable_bundle):
    """Rotation is one step for queries and one for keys; patches are rows as they come; a merger reads four of them as one."""
    kinds = [step.kind for step in compiled(portable_bundle("qwen2_vl"), "vision_encoder", "int8").steps]
    layers = kinds.count(GraphKind.ATTENTION)
    assert kinds.count(GraphKind.MATMUL) == 1 + 4 * layers
    assert kinds.count(GraphKind.ROTARY) == 2 * layers
    assert kinds.count(GraphKind.COSINE) == 2 and kinds.count(GraphKind.CONVERT) == 1
    merger = compiled(portable_bundle("qwen2_vl"), "projector", "int8")
    assert [(value.shape[0], value.each) for value in (*merger.inputs, *merger.outputs)] == [("patches", 4), ("tokens", 1)]
    (copy,) = (step for step in merger.steps if step.kind == GraphKind.COPY)
    assert copy.outputs[0] is not None and copy.outputs[0].buffer.rows == 1


def test_every_step_has_a_name_where_its_time_is_asked_for(portable_bundle, tmp_path):
    path = portable_bundle("qwen2_5_vl")
    opened = _native.Session(str(planned(path, "vision_encoder", tmp_path / "v.plan")), "vision_encoder", plan=True)
    kinds = [GraphKind[name.upper()] for name, _, _ in _native.plan_seconds(opened)]
    assert kinds == [step.kind for step in compiled(path, "vision_encoder").steps]


def test_windows_that_are_left_out_would_be_seen(portable_bundle, tmp_path):
    path = portable_bundle("qwen2_5_vl")
    plan = compiled(path, "vision_encoder")
    windowed = [step for step in plan.steps if step.kind == GraphKind.ATTENTION and step.arguments[5] == Over.SEGMENTS]
    assert 0 < len(windowed) < sum(step.kind == GraphKind.ATTENTION for step in plan.steps)
    for step in windowed:
        step.arguments[5], step.inputs = int(Over.ALL), step.inputs[:3]
    write(plan, tmp_path / "v.plan")
    assert difference(tmp_path / "v.plan", path, "vision_encoder") > 10 * FP32_TOLERANCE


def test_sines_that_turn_the_other_way_would_be_seen(portable_bundle, tmp_path):
    path = portable_bundle("qwen2_vl")
    plan = compiled(path, "vision_encoder")
    for step in plan.steps:
        if step.kind == GraphKind.ROTARY:
            step.inputs = [step.inputs[0], step.inputs[2], step.inputs[1]]
    write(plan, tmp_path / "v.plan")
    assert difference(tmp_path / "v.plan", path, "vision_encoder") > 10 * FP32_TOLERANCE


def test_integers_that_lead_nowhere_are_refused(portable_bundle, tmp_path):
    path = portable_bundle("qwen2_5_vl")
    feeds = next(pictures(path, "vision_encoder"))
    rows = len(feeds["patch_order"])
    plan = PlanSession(planned(path, "vision_encoder", tmp_path / "v.plan"))
    for place in (rows, -rows - 1, 1 << 40, -(1 << 63)):
        wrong = feeds["patch_order"].copy()
        wrong[3] = place
        with pytest.raises(DeviceError, match=f"patch_order.*{place}.*{rows} rows"):
            run_graph(plan, feeds | {"patch_order": wrong})
    with pytest.raises(DeviceError, match=r"window_ids.*lie together"):
        run_graph(plan, feeds | {"window_ids": feeds["window_ids"][::-1]})
    from_the_end = np.where(feeds["patch_order"] % 2, feeds["patch_order"] - rows, feeds["patch_order"])
    for name, array in run_graph(plan, feeds | {"patch_order": from_the_end}).items():
        np.testing.assert_array_equal(array, run_graph(plan, feeds)[name])


def test_rows_that_are_no_whole_tokens_are_refused(portable_bundle, tmp_path):
    path = portable_bundle("qwen2_5_vl")
    feeds = next(pictures(path, "projector"))
    plan = PlanSession(planned(path, "projector", tmp_path / "p.plan"))
    short = feeds | {"image_hidden_states": feeds["image_hidden_states"][:-1]}
    with pytest.raises(DeviceError, match="multiple of 4"):
        run_graph(plan, short)
    fewer = feeds | {"image_hidden_states": feeds["image_hidden_states"][:-4]}
    with pytest.raises(DeviceError, match="others for"):
        run_graph(plan, fewer)
    for name, array in run_graph(plan, {name: array[:0] for name, array in feeds.items()}).items():
        assert array.shape[0] == 0, name


@pytest.mark.parametrize(
    ("name", "role"), [("qwen2_5_vl", "vision_encoder"), ("qwen3_vl", "vision_encoder"), ("mistral3", "projector")]
)
def test_no_single_wrong_byte_makes_a_graph_read_beyond_its_memory(portable_bundle, name, role, tmp_path):
    path = portable_bundle(name)
    survives(planned(path, role, tmp_path / "v.plan", "int8"), next(pictures(path, role)), 150)


def test_attention_within_some_rows_is_refused(portable_bundle):
    model = lowered(portable_bundle("qwen2_vl"), "vision_encoder")
    attention = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    attention.inputs[0].shape = ir.Shape(["tokens", 4, 64])
    with pytest.raises(NotExpressible, match="within some rows"):
        EncoderCompiler(model).compile()


@pytest.mark.parametrize("target", ["cpu-int8", "cpu-int4"])
def test_builds_have_plans(portable_bundle, target, tmp_path):
    path = shutil.copytree(portable_bundle("qwen2_5_vl"), tmp_path / "model.vlm")
    made = build(path, target, name="native")
    for role in ROLES:
        assert made.graphs[role].format == "plan", made.options
    bundle = open_bundle(path, build="native")
    for role in ROLES:
        opened, portable = session(bundle.graph_path(role)), session(open_bundle(path).graph_path(role))
        feeds = next(pictures(path, role))
        for key, value in run_graph(portable, feeds).items():
            assert cosine(run_graph(opened, feeds)[key], value) > (0.998 if target == "cpu-int8" else 0.97), role
