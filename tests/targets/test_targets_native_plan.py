"""Plans for the native kernels: what they compute beside the portable decoder, on any number of threads, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from damaged_plans import PARTS, refused, survives

from vlm_edge.targets.native.compile import Compiler
from vlm_edge.targets.native.errors import NotExpressible
from vlm_edge.targets.native.panels import Quantised, quantised
from vlm_edge.targets.native.plan_file import BufferKind, Kind, place, write
from vlm_edge.targets.native.session import PlanSession
from vlm_edge.targets.pipeline import lower_decoder
from vlm_edge.targets.samples import Samples, run_graph, session
from vlm_edge.targets.selfcheck import FP32_TOLERANCE, Difference
from vlm_edge.targets.steps import STEPS, laid_beside, shared_feeds
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.errors import DeviceError

LONG = ((1, 70, 90, 0), (1, 150, 3, 0), (1, 1, 230, 0), (2, 5, 7, 3), (3, 3, 0, 0))
"""More tokens than a block of queries, more keys than a block of them, keys in several parts; several tokens of several rows."""
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


def lowered(path: Path, precision: str, head: str, block_size: int = 32) -> ir.Model:
    bundle = open_bundle(path)
    model = ir.load(bundle.graph_path("decoder"))
    context = bundle.manifest.contract.context_length
    lower_decoder(model, precision=precision, head=head, context_length=context, block_size=block_size, branches=False)
    return model


def planned(path: Path, out: Path, precision: str = "fp32", block_size: int = 32) -> Path:
    head = "fp32" if precision == "fp32" else "int8"
    cache = ir.DataType.FLOAT if precision == "fp32" else ir.DataType.FLOAT16
    write(Compiler(lowered(path, precision, head, block_size), cache=cache).compile(), out)
    return out


def steps(path: Path):
    bundle = open_bundle(path)
    samples, reference = Samples(bundle), session(bundle.graph_path("decoder"))
    for rows, sequence, past, padding in (*STEPS, *LONG):
        if past + sequence <= bundle.manifest.contract.context_length:
            portable = samples.decoder(sequence=sequence, past=past, rows=rows, padding=padding, seed=sequence)
            yield portable, shared_feeds(portable, capacity=past + sequence + 5), run_graph(reference, portable)


def exact(path: Path, out: Path) -> None:
    planned(path, out)
    plans = {kernels or "best": PlanSession(out, kernels=kernels) for kernels in ("scalar", None)}
    differences = {name: Difference() for name in plans}
    for portable, feeds, wanted in steps(path):
        for name, plan in plans.items():
            for _, got, expected in laid_beside(run_graph(plan, feeds), wanted, portable):
                differences[name].add(got, expected)
    assert all(one.relative < FP32_TOLERANCE for one in differences.values()), differences


@pytest.mark.parametrize("name", NAMES)
def test_plan_computes_what_the_portable_decoder_computes(portable_bundle, name, tmp_path):
    exact(portable_bundle(name), tmp_path / "decoder.plan")


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_plans_of_other_families(portable_bundle, name, tmp_path):
    exact(portable_bundle(name), tmp_path / "decoder.plan")


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_every_number_of_threads_gives_the_same_bits(portable_bundle, precision, tmp_path):
    path = portable_bundle("tiny-llava")
    plan = planned(path, tmp_path / "decoder.plan", precision)
    cases = [feeds for _, feeds, _ in steps(path)]
    wanted = [run_graph(PlanSession(plan), feeds) for feeds in cases]
    for threads in range(2, 9):
        several = PlanSession(plan, threads=threads)
        for feeds, expected in zip(cases, wanted, strict=True):
            for name, array in run_graph(several, feeds).items():
                np.testing.assert_array_equal(array, expected[name], err_msg=f"{threads} threads")


@pytest.mark.parametrize(("precision", "block_size"), [("int4", 32), ("int4", 128), ("int8", 64)])
def test_instruction_sets_agree(portable_bundle, precision, block_size, tmp_path):
    path = portable_bundle("tiny-llava")
    plan = planned(path, tmp_path / "decoder.plan", precision, block_size)
    plain = PlanSession(plan, kernels="scalar")
    for name in ("avx2", "avx512", "neon"):
        try:
            fast = PlanSession(plan, kernels=name)
        except DeviceError:
            continue
        for _, feeds, _ in steps(path):
            got, wanted = run_graph(fast, feeds), run_graph(plain, feeds)
            # Codes of 8 bits may round to a neighbour where sums are added in another order: 1/127 of a block's largest value.
            for key, array in wanted.items():
                assert np.abs(got[key].astype(np.float64) - array).max() < 0.02 * np.abs(array).max(), (name, key)


def test_plan_is_as_close_as_onnx_runtime_with_the_same_weights(portable_bundle, tmp_path):
    path = portable_bundle("tiny-llava")
    plan = PlanSession(planned(path, tmp_path / "decoder.plan", "int4"))
    ir.save(lowered(path, "int4", "int8"), tmp_path / "decoder.onnx")
    other = session(tmp_path / "decoder.onnx")
    for portable, feeds, _ in steps(path):
        rows, sequence = feeds["inputs_embeds"].shape[:2]
        if rows > 1 and sequence > 1 and portable["attention_mask"].shape[1] > sequence:
            continue  # its kernel takes several tokens after a past of one row only
        for name, got, wanted in laid_beside(run_graph(plan, feeds), run_graph(other, feeds), portable):
            left, right = got.astype(np.float64).reshape(-1), wanted.astype(np.float64).reshape(-1)
            assert left @ right / np.linalg.norm(left) / np.linalg.norm(right) > 0.999, name


def test_tokens_of_a_block_see_each_other(portable_bundle, tmp_path):
    """Planted mistake: with the blocks ignored, the prefix of PaliGemma comes out differently."""
    path = portable_bundle("paligemma")
    model = lowered(path, "fp32", "fp32")
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            node.metadata_props["vlm_edge.mask"] = "causal"
    write(Compiler(model, cache=ir.DataType.FLOAT).compile(), tmp_path / "blind.plan")
    seeing, blind = PlanSession(planned(path, tmp_path / "decoder.plan")), PlanSession(tmp_path / "blind.plan")
    feeds = next(feeds for _, feeds, _ in steps(path))
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
    plan = Compiler(lowered(portable_bundle(name), "fp32", "fp32"), cache=ir.DataType.FLOAT).compile()
    write(plan, tmp_path / "right.plan")
    spoil(plan)
    write(plan, tmp_path / "wrong.plan")
    right, wrong = PlanSession(tmp_path / "right.plan"), PlanSession(tmp_path / "wrong.plan")
    apart = [
        np.abs(run_graph(right, feeds)["logits"] - run_graph(wrong, feeds)["logits"]).max()
        for _, feeds, _ in itertools.islice(steps(portable_bundle(name)), 4)
    ]
    assert max(apart) > 1e-3


def test_an_unknown_operation_is_named(portable_bundle):
    model = lowered(portable_bundle("tiny-llava"), "fp32", "fp32")
    node = next(node for node in model.graph if node.op_type == "Sigmoid")
    node.op_type = "Erf"
    with pytest.raises(NotExpressible, match="Erf"):
        Compiler(model).compile()


def test_buffers_that_are_needed_together_lie_apart(portable_bundle):
    plan = Compiler(lowered(portable_bundle("tiny-llava"), "int4", "int8")).compile()
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
    refused(planned(portable_bundle("tiny-llava"), tmp_path / "decoder.plan", "int4"), part)


@pytest.mark.parametrize("name", ["tiny-llava", "idefics", "blip2-t5", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_no_single_wrong_byte_makes_a_plan_read_beyond_its_memory(portable_bundle, tmp_path, name):
    """Refused, or it runs (a wrong number in it may only give wrong numbers)."""
    feeds = next(feeds for _, feeds, _ in steps(portable_bundle(name)))
    survives(planned(portable_bundle(name), tmp_path / "decoder.plan", "int4"), feeds, 150)
