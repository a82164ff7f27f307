"""Plans of graphs over texts and states of any length: text encoders, Q-Formers with instructions, keys and values."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from damaged_plans import refused, survives

from vlm_edge.targets.build import build
from vlm_edge.targets.id_limits import id_limits
from vlm_edge.targets.native.encoder import EncoderCompiler
from vlm_edge.targets.native.plan_file import GraphKind, write
from vlm_edge.targets.native.session import PlanSession
from vlm_edge.targets.pipeline import lower_encoder
from vlm_edge.targets.samples import run_graph, session
from vlm_edge.targets.selfcheck import FP32_TOLERANCE, Difference
from vlm_edge.targets.target import load_target
from vlm_edge_runtime import _native, load
from vlm_edge_runtime.bundle.manifest import GraphEntry
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.errors import DeviceError

GRAPHS = [("tiny-clip", "text_encoder"), ("siglip", "text_encoder"), ("vit-gpt2", "cross_kv"), ("instructblip-opt", "qformer")]
MORE = [
    ("clip", "text_encoder"),
    ("coca", "text_encoder"),
    ("coca", "cross_kv"),
    ("blip-vqa", "encoder"),
    ("blip-vqa", "cross_kv"),
    ("blip-caption", "cross_kv"),
    ("blip2-t5", "cross_kv"),
    ("deit-roberta", "cross_kv"),
    ("donut-mbart", "cross_kv"),
    ("florence2", "cross_kv"),
    ("idefics", "cross_kv"),
    ("idefics-plain", "cross_kv"),
    ("instructblip-llama", "qformer"),
    ("instructblip-t5", "qformer"),
    ("mllama", "cross_kv"),
    ("pix2struct", "cross_kv"),
    ("tiny-coca", "text_encoder"),
    ("tiny-visual_gpt", "cross_kv"),
    ("vit-bart", "cross_kv"),
    ("vit-bert", "cross_kv"),
    ("vit-trocr-sines", "cross_kv"),
    ("x_instructblip", "qformer"),
]

TRIED = (5, 1, 40, 12, 16, 3)


def model_of(path: Path, role: str, precision: str) -> ir.Model:
    model = ir.load(open_bundle(path).graph_path(role))
    lower_encoder(model, precision="fp32" if precision == "int8" else precision)
    return model


def planned(path: Path, role: str, out: Path, precision: str = "fp32") -> Path:
    plan = EncoderCompiler(model_of(path, role, precision), integer=precision == "int8").compile()
    write(plan, out)
    return out


def feeds_of(path: Path, role: str, rows: int, length: int, seed: int = 0, left: bool = False) -> dict[str, np.ndarray]:
    """Random inputs; masks hide a number of tokens of their own in each row but the first: the last or (`left`) the first."""
    entry: GraphEntry = open_bundle(path).graphs[role]
    limits = id_limits(open_bundle(path).graph_path(role))
    generator, feeds = np.random.default_rng(seed), {}
    for spec in entry.inputs:
        shape = (rows, *(size if isinstance(size, int) else length for size in spec.shape[1:]))
        if spec.name.endswith("mask"):
            valid = generator.integers(1, max(shape[1], 1) + 1, (rows, 1))
            places = np.arange(shape[1])[:: -1 if left else 1]
            feeds[spec.name] = (places < valid).astype(np.int64)
            feeds[spec.name][0] = 1
        elif spec.dtype == "int64":
            feeds[spec.name] = generator.integers(0, limits.get(spec.name, 20), shape)
        else:
            feeds[spec.name] = generator.standard_normal(shape).astype(np.float32)
    return feeds


def lengths_of(path: Path, role: str, plan: PlanSession) -> list[int]:
    """Lengths to try: one, those around what the plan was made from; longer ones where the plan has them."""
    sizes = [size for one in plan.get_inputs() for size in one.shape[1:]]
    if not any(isinstance(size, str) for size in sizes):
        return [0]
    found = []
    for length in TRIED:
        try:
            run_graph(plan, feeds_of(path, role, 1, length))
            found.append(length)
        except DeviceError as error:
            assert "a length of" in str(error)
    return found


def exact(path: Path, role: str, out: Path) -> None:
    """Padding to the left only where every token sees one: of others onnxruntime makes 0, PyTorch the mean of all."""
    plan, portable = PlanSession(planned(path, role, out)), session(open_bundle(path).graph_path(role))
    steps = EncoderCompiler(model_of(path, role, "fp32")).compile().steps
    longest = steps[0].arguments[1] if steps[0].kind == GraphKind.LENGTH else 0
    causal = any(step.kind == GraphKind.ATTENTION and step.arguments[3] for step in steps)
    difference, lengths = Difference(), lengths_of(path, role, plan)
    assert longest == 0 or longest > 12
    assert lengths == ([length for length in TRIED if length <= longest] if longest else [0])
    for number, length in enumerate(lengths):
        for rows in (1, 3):
            feeds = feeds_of(path, role, rows, length, seed=number, left=number % 2 == 1 and not causal)
            wanted = run_graph(portable, feeds)
            for name, found in run_graph(plan, feeds).items():
                difference.add(found, wanted[name])
    assert difference.relative < FP32_TOLERANCE


@pytest.mark.parametrize(("name", "role"), GRAPHS)
def test_plan_computes_what_the_portable_graph_computes(portable_bundle, name, role, tmp_path):
    exact(portable_bundle(name), role, tmp_path / "one.plan")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "role"), MORE)
def test_plans_of_other_graphs(portable_bundle, name, role, tmp_path):
    exact(portable_bundle(name), role, tmp_path / "one.plan")


@pytest.mark.parametrize(("name", "role"), GRAPHS)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_few_bits_stay_close(portable_bundle, name, role, precision, tmp_path):
    """8 bits to the portable graph; 4 bits, of which random weights lose much, to the graph whose weights have 4 bits too."""
    path = portable_bundle(name)
    plan = PlanSession(planned(path, role, tmp_path / "one.plan", precision))
    feeds = feeds_of(path, role, 3, 9)
    reference = open_bundle(path).graph_path(role)
    if precision == "int4":
        reference = tmp_path / "lowered.onnx"
        lowered = model_of(path, role, precision)
        ir.external_data.load_to_model(lowered)
        ir.save(lowered, reference)
    wanted = run_graph(session(reference), feeds)
    for key, value in run_graph(plan, feeds).items():
        left, right = value.astype(np.float64).reshape(-1), wanted[key].astype(np.float64).reshape(-1)
        cosine = left @ right / np.linalg.norm(left) / np.linalg.norm(right)
        assert cosine > 0.998, key


@pytest.mark.parametrize("kernels", _native.kernels())
@pytest.mark.parametrize("precision", ["int8", "int4", "fp32"])
def test_threads_and_neighbours_change_nothing(portable_bundle, precision, kernels, tmp_path):
    path = portable_bundle("tiny-clip")
    plan = planned(path, "text_encoder", tmp_path / "one.plan", precision)
    feeds = feeds_of(path, "text_encoder", 5, 12)
    wanted = run_graph(PlanSession(plan, kernels=kernels), feeds)
    for threads in (2, 3):
        several = PlanSession(plan, threads=threads, kernels=kernels)
        for length in (12, 5, 12):  # another length between two of one
            found = run_graph(several, feeds if length == 12 else feeds_of(path, "text_encoder", 2, length))
            if length == 12:
                np.testing.assert_array_equal(found["text_embeds"], wanted["text_embeds"])
    alone = run_graph(PlanSession(plan, kernels=kernels), {name: array[2:3] for name, array in feeds.items()})
    difference = Difference()
    difference.add(alone["text_embeds"], wanted["text_embeds"][2:3])
    assert difference.relative < FP32_TOLERANCE


def test_what_is_not_in_the_tables_is_refused(portable_bundle, tmp_path):
    path = portable_bundle("tiny-clip")
    plan = PlanSession(planned(path, "text_encoder", tmp_path / "one.plan"))
    feeds = feeds_of(path, "text_encoder", 2, 6)
    rows = 1 + max(int(feeds_of(path, "text_encoder", 50, 16)["input_ids"].max()), 0)
    for number in (1 << 40, -(1 << 40), 100 * rows):
        wrong = {**feeds, "input_ids": feeds["input_ids"].copy()}
        wrong["input_ids"][1, 3] = number
        with pytest.raises(DeviceError, match=f"'input_ids' has {number}"):
            run_graph(plan, wrong)
    for length in (0, 100_000):
        with pytest.raises(DeviceError, match=f"a length of {length}"):
            run_graph(plan, feeds_of(path, "text_encoder", 1, length))
    shorter = {**feeds, "attention_mask": feeds["attention_mask"][:, :5].copy()}
    with pytest.raises(DeviceError, match="has size 5 in dimension 1, expected 6"):
        run_graph(plan, shorter)
    run_graph(plan, feeds)


@pytest.mark.parametrize(("name", "role", "part"), [(*GRAPHS[0], "causal"), (*GRAPHS[0], "row"), (*GRAPHS[3], "mask")])
def test_a_rule_that_is_left_out_would_be_seen(portable_bundle, name, role, part, tmp_path):
    path = portable_bundle(name)
    plan = EncoderCompiler(model_of(path, role, "fp32")).compile()
    masked = next(step for step in plan.steps if step.kind == GraphKind.ATTENTION and len(step.inputs) > 3)
    if part == "causal":
        masked.arguments[3] = 0
    elif part == "mask":
        masked.inputs, masked.arguments[4] = masked.inputs[:3], 0
    else:
        next(step for step in plan.steps if step.kind == GraphKind.PICK).arguments[0] = 2
    write(plan, tmp_path / "one.plan")
    feeds = feeds_of(path, role, 3, 8)
    wanted = run_graph(session(open_bundle(path).graph_path(role)), feeds)
    difference = Difference()
    for key, found in run_graph(PlanSession(tmp_path / "one.plan"), feeds).items():
        difference.add(found, wanted[key])
    assert difference.relative > 10 * FP32_TOLERANCE


@pytest.mark.parametrize("part", ["head", "steps", "tail"])
@pytest.mark.parametrize(("name", "role"), GRAPHS[::2])
def test_damaged_plans_are_refused(portable_bundle, name, role, part, tmp_path):
    refused(planned(portable_bundle(name), role, tmp_path / "one.plan", "int8"), part)


@pytest.mark.parametrize(("name", "role"), [GRAPHS[0], GRAPHS[3]])
def test_no_single_wrong_byte_makes_it_read_beyond_its_memory(portable_bundle, name, role, tmp_path):
    path = portable_bundle(name)
    survives(planned(path, role, tmp_path / "one.plan", "int8"), feeds_of(path, role, 2, 9), 150)


def test_a_wrong_size_or_place_is_refused_or_harmless(portable_bundle, tmp_path):
    """Every number that says how something grows with the length, changed one by one."""
    path = portable_bundle("instructblip-opt")
    file = planned(path, "qformer", tmp_path / "one.plan")
    data = file.read_bytes()
    plan = EncoderCompiler(model_of(path, "qformer", "fp32")).compile()
    tables = [step.weights[0].make().tobytes() for step in plan.steps if step.kind in (GraphKind.LENGTH, GraphKind.SPREAD)]
    generator, tried, stopped = np.random.default_rng(0), 0, []
    for table in dict.fromkeys(tables):
        at = data.index(table)
        for place in generator.choice(len(table) // 4, min(8, len(table) // 4), replace=False):
            for number in (-1, 1 << 30, int(generator.integers(0, 60))):
                changed = bytearray(data)
                changed[at + 4 * place : at + 4 * place + 4] = int(number).to_bytes(4, "little", signed=True)
                file.unlink()
                file.write_bytes(bytes(changed))
                tried += 1
                try:
                    session_ = PlanSession(file)
                    for length in (9, 30):
                        run_graph(session_, feeds_of(path, "qformer", 2, length))
                except DeviceError:
                    stopped.append(number)
    assert tried >= 60 and len(stopped) >= 0.6 * tried  # others change nothing, or the step of a run of one place
    assert stopped.count(1 << 30) >= 0.8 * tried / 3


def test_a_build_of_both_towers_has_plans(portable_bundle, tmp_path):
    path = shutil.copytree(portable_bundle("tiny-clip"), tmp_path / "clip.vlm")
    target = load_target("cpu-int8")
    made = build(path, msgspec.structs.replace(target, options=target.options), name="native")
    assert made.options["text_encoder.kernels"] == "native" and made.graphs["text_encoder"].format == "plan"
    texts = ["a red square", "two green circles on a long line", "x"]
    with load(path, build="native") as native, load(path, build="portable") as portable:
        left, right = (one.embed_text(texts) for one in (native, portable))
    assert left.shape == right.shape
    assert float((left * right).sum(axis=1).min()) > 0.999
