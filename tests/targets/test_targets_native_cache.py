"""KV caches in 8 bits: what is kept, what plans compute with it, what builds say and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from decoder_plans import (
    alike_in_every_instruction_set,
    beside_the_portable_decoder,
    calls,
    families,
    plan_of,
    planned,
    same_bits_on_every_number_of_threads,
)

from vlm_edge.cli.main import group
from vlm_edge.targets.build import build
from vlm_edge.targets.native.cache_codes import coded, decoded
from vlm_edge.targets.native.plan_file import Kind, write
from vlm_edge.targets.native.session import PlanSession
from vlm_edge.targets.samples import run_graph
from vlm_edge.targets.selfcheck import Difference
from vlm_edge.targets.target import load_target
from vlm_edge_runtime.bundle.manifest import KVLayout
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.errors import DeviceError, TargetError

FURTHER = ((1, 70, 90, 0), (1, 1, 230, 0), (2, 5, 7, 3))
"""Of many new tokens at once all are rounded, which the portable decoder's are not: prompts of 70, not of 150."""
NAMES = ["tiny-llava", "paligemma", "florence2", "blip2-t5"]
"""Grouped queries, blocks of tokens that see each other, static keys, biases by distance."""
MORE = ["llava-gpt2", "llava-opt", "llava-phi3", "llava-gemma2", "gemma3", "qwen2_vl", "qwen3_vl", "idefics", "mllama", "git"]
"""One head size after another, windows, soft caps, rotary of several axes, gates."""


CODES = ir.DataType.INT8


def test_codes_are_the_nearest_and_scales_never_too_small():
    random = np.random.default_rng(0)
    for size in (8, 32, 40, 64, 128):
        large = np.float32(10) ** random.integers(-6, 4, (2, 3, 5, 1))
        entries = random.standard_normal((2, 3, 5, size)).astype(np.float32) * large
        entries[0, 0, 0] = 0
        codes, scales = coded(entries)
        assert scales.shape == (2, 3 * -(-size // 32), 5, 1)
        assert np.abs(codes).max() <= 127
        by_entry = scales.reshape(2, 3, -1, 5).transpose(0, 1, 3, 2).astype(np.float64)
        allowed = np.repeat(by_entry, 32, axis=-1)[..., :size] * 0.501
        assert (np.abs(decoded(codes, scales).astype(np.float64) - entries) <= allowed).all()
        assert not decoded(codes, scales)[0, 0, 0].any()


def test_new_entries_are_the_codes_of_what_a_float_cache_keeps(portable_bundle, tmp_path):
    """Rotated first, then in 8 bits: bit for bit, in the layer that reads no cache before it writes its own."""
    path = portable_bundle("tiny-llava")
    floats = PlanSession(planned(path, tmp_path / "floats.plan", "fp32", ir.DataType.FLOAT))
    codes = PlanSession(planned(path, tmp_path / "codes.plan", "fp32", CODES))
    for _, feeds in calls(path):
        wanted, found = run_graph(floats, feeds), run_graph(codes, feeds)
        for name in ("present.0.key", "present.0.value"):
            np.testing.assert_array_equal(found[name], decoded(*coded(wanted[name])))


@families(NAMES, MORE)
def test_plans_compute_what_the_portable_decoder_does_on_rounded_entries(portable_bundle, name, tmp_path):
    """Beside float caches of the same codes only the new tokens' rounding is left, half of 1/127 of a block's largest number:

    some hundredths of the largest logit where scores are sharp (T5's are not divided by the root of the head's size).
    """
    path = portable_bundle(name)
    plan = planned(path, tmp_path / "decoder.plan", "fp32", CODES)
    found = beside_the_portable_decoder(path, plan, FURTHER, lambda array: decoded(*coded(array)))
    assert len(found) == 2
    assert all(one.cosine > 0.999 and one.relative < 0.05 for one in found.values()), found


def test_every_number_of_threads_gives_the_same_bits(portable_bundle, tmp_path):
    path = portable_bundle("tiny-llava")
    same_bits_on_every_number_of_threads(path, planned(path, tmp_path / "decoder.plan", "int4", CODES))


def test_instruction_sets_agree(portable_bundle, tmp_path):
    """A number between two codes may fall to either side: 1/127 of its block's largest."""
    path = portable_bundle("tiny-llava")
    alike_in_every_instruction_set(path, planned(path, tmp_path / "decoder.plan", "fp32", CODES), 0.01)


def swapped_scales(plan):
    for step in plan.steps:
        if step.kind == Kind.ATTENTION:
            step.arguments[8:10] = step.arguments[9:7:-1]


def scales_of_the_layer_before(plan):
    for step in plan.steps:
        if step.kind == Kind.ATTENTION:
            step.arguments[8:10] = [max(one - 2, 8) for one in step.arguments[8:10]]


@pytest.mark.parametrize("spoil", [swapped_scales, scales_of_the_layer_before])
def test_a_mistake_in_the_scales_shows(portable_bundle, tmp_path, spoil):
    path = portable_bundle("tiny-llava")
    plan = plan_of(path, "fp32", CODES)
    write(plan, tmp_path / "right.plan")
    spoil(plan)
    write(plan, tmp_path / "wrong.plan")
    right, wrong, difference = PlanSession(tmp_path / "right.plan"), PlanSession(tmp_path / "wrong.plan"), Difference()
    for _, feeds in calls(path):
        difference.add(run_graph(wrong, feeds)["logits"], run_graph(right, feeds)["logits"])
    assert difference.cosine < 0.999


@pytest.mark.parametrize(("argument", "value"), [(8, 0), (9, 1), (8, 99), (9, -1)])
def test_plans_whose_scales_are_no_scales_are_refused(portable_bundle, tmp_path, argument, value):
    plan = plan_of(portable_bundle("tiny-llava"), "fp32", CODES)
    for step in plan.steps:
        if step.kind == Kind.ROTARY:
            step.arguments[argument] = value
    write(plan, tmp_path / "damaged.plan")
    with pytest.raises(DeviceError, match="damaged: a step does not fit"):
        PlanSession(tmp_path / "damaged.plan")


@pytest.fixture(scope="module")
def built(portable_bundle, tmp_path_factory) -> Path:
    """tiny-llava with 4-bit weights, its cache in float16 and in 8 bits."""
    path = tmp_path_factory.mktemp("kv") / "tiny.vlm"
    shutil.copytree(portable_bundle("tiny-llava"), path)
    build(path, "cpu-int4", name="floats")
    build(path, "cpu-int4", kv="int8", name="codes")
    return path


def test_the_build_and_inspect_say_what_a_token_takes(built):
    opened = open_bundle(built, build="codes")
    assert opened.build.options["kv"] == "int8"
    assert (opened.kv.dtype, opened.kv.scale_block, opened.kv.shared_buffer) == ("int8", 32, True)
    caches = [spec for spec in opened.graphs["decoder"].inputs if spec.name.startswith("past_key_values.")]
    stored = sum(spec.shape[1] * spec.shape[3] * np.dtype(spec.dtype).itemsize for spec in caches)
    assert opened.kv.entry_bytes == stored
    floats = open_bundle(built, build="floats")
    assert (floats.kv.dtype, floats.build.options["kv"]) == ("float16", "float")
    assert opened.kv.entry_bytes * 32 == floats.kv.entry_bytes * 17
    done = CliRunner().invoke(group, ["inspect", str(built), "--json", "--context-length", "100"])
    plans = json.loads(done.output)["memory"]
    assert plans["codes"]["kv_token"] == stored
    assert plans["codes"]["kv_cache"] == 100 * stored
    assert "int8" in CliRunner().invoke(group, ["inspect", str(built)]).output


def test_bytes_of_a_token():
    layout = KVLayout(layers=30, kv_heads=3, head_dim=64, dtype="float16")
    assert layout.entry_bytes == 23_040
    assert msgspec.structs.replace(layout, dtype="int8", scale_block=32).entry_bytes == 2 * 30 * 3 * (64 + 4)
    assert msgspec.structs.replace(layout, head_dim=80, dtype="int8", scale_block=32).entry_bytes == 2 * 30 * 3 * (80 + 6)


def with_options(name: str, **given):
    found = load_target(name)
    return msgspec.structs.replace(found, options=msgspec.structs.replace(found.options, **given))


def test_what_cannot_have_it_is_refused(built, portable_bundle, tmp_path):
    for target, kv, why in (
        ("cpu-fp32", "int8", "weights are fp32"),
        (with_options("cpu-int4", kernels="onnxruntime", kv="int8"), None, "kernels is 'onnxruntime'"),
        ("rtx-40", "int8", "rtx-40: an int8 KV cache is one of native decoders on the CPU"),
    ):
        with pytest.raises(TargetError, match=why):
            build(built, target, kv=kv, name="refused")
    shutil.copytree(portable_bundle("clip"), tmp_path / "clip.vlm")
    with pytest.raises(TargetError, match="this model has no decoder"):
        build(tmp_path / "clip.vlm", "cpu-int4", kv="int8")
    assert not list((built / "builds").glob("refused*"))


@pytest.mark.slow
def test_a_decoder_without_a_plan_is_refused_with_the_reason(portable_bundle, tmp_path):
    shutil.copytree(portable_bundle("janus"), tmp_path / "janus.vlm")
    with pytest.raises(TargetError, match=r"an int8 KV cache is one of native decoders, which have no kernel for .*--kv float"):
        build(tmp_path / "janus.vlm", "cpu-int4", kv="int8")


def test_the_command_line_builds_it(built):
    done = CliRunner().invoke(group, ["build", str(built), "--target", "cpu-int8", "--kv", "int8", "--name", "cli", "--json"])
    assert done.exit_code == 0, done.output
    assert open_bundle(built, build="cli").kv.dtype == "int8"
