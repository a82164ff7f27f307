"""Plans for the native kernels: what they compute beside the portable decoder, on any number of threads, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from damaged_plans import PARTS, refused, survives
from decoder_plans import (
    alike_in_every_instruction_set,
    beside_the_portable_decoder,
    calls,
    families,
    lowered,
    planned,
    same_bits_on_every_number_of_threads,
)

from vlm_edge.targets.native.compile import Compiler
from vlm_edge.targets.native.errors import NotExpressible
from vlm_edge.targets.native.panels import Quantised, quantised
from vlm_edge.targets.native.plan_file import BufferKind, Kind, place, write
from vlm_edge.targets.native.session import PlanSession
from vlm_edge.targets.samples import run_graph, session
from vlm_edge.targets.selfcheck import FP32_TOLERANCE
from vlm_edge.targets.steps import laid_beside

NAMES = ["tiny-llava", "qwen2_vl", "paligemma", "florence2", "idefics", "blip2-t5", "qwen3_vl"]
MORE = [
    "llava-gpt2",
    "llava-opt",
    "llava-phi3",
    "llava-gemma",
    "llava-gemma2",
    "llava-gemma3",
    "llava-qwen3",
    "llava-mistral",
    "gemma3",
    "git",
    "simvlm",
    "vit-gpt2",
    "vit-bart",
    "blip-caption",
    "coca",
    "mllama",
    "idefics-plain",
    "instructblip-t5",
    "pix2struct",
    "aya_vision",
    "cohere2_vision",
    "chameleon",
    "cm3leon",
    "vit-bert",
    "deit-roberta",
    "vit-trocr-sines",
    "visual_gpt",
]


def written(path: Path, out: Path, precision: str = "fp32", block_size: int = 32) -> Path:
    """A plan whose cache is as its builds have it."""
    return planned(path, out, precision, ir.DataType.FLOAT if precision == "fp32" else ir.DataType.FLOAT16, block_size)


@families(NAMES, MORE)
def test_plan_computes_what_the_portable_decoder_computes(portable_bundle, name, tmp_path):
    path = portable_bundle(name)
    found = beside_the_portable_decoder(path, written(path, tmp_path / "decoder.plan"))
    assert len(found) == 2 and all(one.relative < FP32_TOLERANCE for one in found.values()), found


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_every_number_of_threads_gives_the_same_bits(portable_bundle, precision, tmp_path):
    path = portable_bundle("tiny-llava")
    same_bits_on_every_number_of_threads(path, written(path, tmp_path / "decoder.plan", precision))


@pytest.mark.parametrize(("precision", "block_size"), [("int4", 32), ("int4", 128), ("int8", 64)])
def test_instruction_sets_agree(portable_bundle, precision, block_size, tmp_path):
    """Codes of 8 bits may round to a neighbour where sums are added in another order: 1/127 of a block's largest value."""
    path = portable_bundle("tiny-llava")
    alike_in_every_instruction_set(path, written(path, tmp_path / "decoder.plan", precision, block_size), 0.02)


def test_plan_is_as_close_as_onnx_runtime_with_the_same_weights(portable_bundle, tmp_path):
    path = portable_bundle("tiny-llava")
    plan = PlanSession(written(path, tmp_path / "decoder.plan", "int4"))
    ir.save(lowered(path, "int4"), tmp_path / "decoder.onnx")
    other = session(tmp_path / "decoder.onnx")
    for portable, feeds in calls(path):
        rows, sequence = feeds["inputs_embeds"].shape[:2]
        if rows > 1 and sequence > 1 and portable["attention_mask"].shape[1] > sequence:
            continue  # its kernel takes several tokens after a past of one row only
        for name, got, wanted in laid_beside(run_graph(plan, feeds), run_graph(other, feeds), portable):
            left, right = got.astype(np.float64).reshape(-1), wanted.astype(np.float64).reshape(-1)
            assert left @ right / np.linalg.norm(left) / np.linalg.norm(right) > 0.999, name


def test_tokens_of_a_block_see_each_other(portable_bundle, tmp_path):
    """Planted mistake: with the blocks ignored, the prefix of PaliGemma comes out differently."""
    path = portable_bundle("paligemma")
    model = lowered(path, "fp32")
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            node.metadata_props["vlm_edge.mask"] = "causal"
    write(Compiler(model, cache=ir.DataType.FLOAT).compile(), tmp_path / "blind.plan")
    seeing, blind = PlanSession(written(path, tmp_path / "decoder.plan")), PlanSession(tmp_path / "blind.plan")
    feeds = next(feeds for _, feeds in calls(path))
    feeds["block_ids"] = np.ones_like(feeds["block_ids"])
    assert np.abs(run_graph(seeing, feeds)["logits"] - run_graph(blind, feeds)["logits"]).max() > 1e-3


def sees_every_image(plan):
    for step in plan.steps:
        if step.kind == Kind.CROSS:
            step.arguments[6] = -1


def blind_tokens_see_otherwise(plan):
    for step in plan.steps:
        if step.kind == Kind.CROSS:
            step.arguments[7] ^= 1


def forgets_distances(plan):
    for step in plan.steps:
        if step.kind == Kind.ATTENTION:
            step.weights = []


def mixes_up_inputs(plan):
    given = [one for one in plan.buffers if one.kind == BufferKind.INPUT]
    given[0].offset, given[1].offset = given[1].offset, given[0].offset


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("idefics", sees_every_image),
        ("blip2-t5", forgets_distances),
        ("qwen3_vl", mixes_up_inputs),
        pytest.param("mllama", blind_tokens_see_otherwise, marks=pytest.mark.slow),
    ],
)
def test_a_mistake_in_what_tokens_see_shows(portable_bundle, tmp_path, name, spoil):
    plan = Compiler(lowered(portable_bundle(name), "fp32"), cache=ir.DataType.FLOAT).compile()
    write(plan, tmp_path / "right.plan")
    spoil(plan)
    write(plan, tmp_path / "wrong.plan")
    right, wrong = PlanSession(tmp_path / "right.plan"), PlanSession(tmp_path / "wrong.plan")
    apart = [
        np.abs(run_graph(right, feeds)["logits"] - run_graph(wrong, feeds)["logits"]).max()
        for _, feeds in itertools.islice(calls(portable_bundle(name)), 4)
    ]
    assert max(apart) > 1e-3


def test_an_unknown_operation_is_named(portable_bundle):
    model = lowered(portable_bundle("tiny-llava"), "fp32")
    node = next(node for node in model.graph if node.op_type == "Sigmoid")
    node.op_type = "Erf"
    with pytest.raises(NotExpressible, match="Erf"):
        Compiler(model).compile()


def test_buffers_that_are_needed_together_lie_apart(portable_bundle):
    plan = Compiler(lowered(portable_bundle("tiny-llava"), "int4")).compile()
    total = place(plan)
    for index, step in enumerate(plan.steps):
        live = {ref.buffer for ref in (*step.inputs, *step.outputs) if ref is not None and ref.buffer.bytes}
        spans = sorted((one.offset, one.offset + one.bytes) for one in live)
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans)), index
        assert not spans or spans[-1][1] <= total
    assert total < sum(one.bytes for one in plan.buffers) / 3, "memory is shared"
    assert sum(step.kind == Kind.GATED for step in plan.steps) == 4, "gate and up are one product"


def test_panels_hold_the_weights_in_the_documented_order():
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 16, (20, 2, 32)).astype(np.uint8)
    packed = (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)
    scales = generator.uniform(-1e-6, 1e-6, (20, 2)).astype(np.float32)
    weight = quantised(Quantised(4, 32, 40, lambda: packed, lambda: scales), np.arange(20))
    data = weight.make().reshape(2, -1)
    output, depth = 17, 37  # panel 1, output 1; block 1, group 1, input 1
    byte = data[1, 64 + 256 + 1 * 64 + 1 * 4 + 1]  # behind the line of scales and block 0
    assert byte & 15 == codes[output, depth // 32, depth % 32]
    stored = data[1, :64].view(np.float16).reshape(2, 16)[1, 1] * np.float64(weight.scale)
    assert abs(stored - scales[output, 1]) <= abs(scales[output, 1]) * 2**-11
    assert not data[1, :64].view(np.float16).reshape(2, 16)[:, 4:].any(), "no outputs, no scales"


@pytest.mark.parametrize("part", PARTS)
def test_damaged_plans_are_refused(portable_bundle, tmp_path, part):
    refused(written(portable_bundle("tiny-llava"), tmp_path / "decoder.plan", "int4"), part)


@pytest.mark.parametrize("name", ["tiny-llava", "idefics", "blip2-t5", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_no_single_wrong_byte_makes_a_plan_read_beyond_its_memory(portable_bundle, tmp_path, name):
    """Refused, or it runs (a wrong number in it may only give wrong numbers)."""
    feeds = next(feeds for _, feeds in calls(portable_bundle(name)))
    survives(written(portable_bundle(name), tmp_path / "decoder.plan", "int4"), feeds, 150)
