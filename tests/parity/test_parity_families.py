"""`compare` on checkpoints of every family: transformers' own processor, `generate` and logits against the bundle's."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from graph_targets import graph_target
from planted import copy, edit_graph, set_weight

from vlm_edge.parity import bisect_bundle, compare
from vlm_edge.parity.probe import label
from vlm_edge.parity.reference import TorchReference
from vlm_edge.parity.reference_inputs import ReferenceInputs
from vlm_edge.parity.subject import Prepared
from vlm_edge.passes.graph import is_weight
from vlm_edge.targets.build import build
from vlm_edge_runtime.bundle.manifest import GenerativeContract
from vlm_edge_runtime.bundle.reader import read_manifest

FAST = ("florence2", "idefics")
"""A prompt that the processor rewrites for an encoder; pictures between texts. Every system is compared in tests/coverage."""
SLOW = ("llava-gemma2", "blip2-qwen2", "instructblip-t5", "deit-roberta", "internvl-qwen3", "idefics-plain")
"""Variants that stand for no system there."""
NAMES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("name", NAMES)
def test_a_sound_bundle_passes(name, portable_bundle, tiny_checkpoint, tmp_path):
    path = shutil.copytree(portable_bundle(name), tmp_path / f"{name}.vlm")
    contract = read_manifest(path).contract
    if isinstance(contract, GenerativeContract) and contract.modality("image") is None:
        pytest.skip("it reads no pictures, and the drawn examples have nothing else")
    build(path, "cpu-fp32")
    report = compare(path, tiny_checkpoint(name), max_new_tokens=6)
    assert {one.name: one.verdict for one in report.builds} == {"portable": "PASS", "cpu-fp32": "PASS"}, report.rows()
    assert report.exit_code == 0 and (report.examples or not isinstance(contract, GenerativeContract))


def test_a_reference_is_forced_along_any_answer(tiny_checkpoint):
    """Along its own answer it gives the logits it had; along another one those that follow that one's tokens."""
    from vlm_edge.parity.examples import built_in

    original = TorchReference(str(tiny_checkpoint("llava-llama")))
    try:
        example = built_in()[0]
        answer = original.greedy(example, 4)
        own = original.forced(example, answer.tokens)
        assert own.argmax(-1).tolist() == answer.tokens
        other = [answer.tokens[0], (answer.tokens[1] + 1) % own.shape[1], *answer.tokens[2:]]
        forced = original.forced(example, other)
        np.testing.assert_allclose(forced[:2], own[:2], atol=1e-4)
        assert np.abs(forced[2] - own[2]).max() > 1e-2
    finally:
        original.close()


def test_the_decoders_tokens_count_where_generate_rewrites_the_prompt():
    one = Prepared([1, 5, 2], [], [9, 5])
    assert one.reads_like(Prepared([1, 5, 2], [])) and one.reads_like(Prepared([7], [], [9, 5]))
    assert not one.reads_like(Prepared([1, 5], [], [9])) and not one.reads_like(Prepared([7], []))
    assert not Prepared([1], []).reads_like(Prepared([2], []))


def test_a_processor_that_takes_nothing_is_named(tiny_checkpoint):
    from vlm_edge.parity.examples import built_in
    from vlm_edge_runtime.errors import ParityError

    original = TorchReference(str(tiny_checkpoint("llava-llama")))
    try:

        def refuse(**given):
            raise ValueError("no pictures today")

        inputs = ReferenceInputs(original.checkpoint, refuse, original._inputs._contract)
        with pytest.raises(ParityError, match="in no known way"):
            inputs(built_in()[0])
    finally:
        original.close()


PLANTED = [
    ("idefics", "resampler", None),
    ("idefics", "cross_kv", None),
    ("idefics", "decoder", "cpu-fp32"),
    ("paligemma2", "decoder", "cpu-fp32"),
    pytest.param("blip2-t5", "qformer", "cpu-fp32", marks=pytest.mark.slow),
    pytest.param("blip2-t5", "encoder", None, marks=pytest.mark.slow),
    pytest.param("qwen3_vl", "vision_encoder", "cpu-fp32", marks=pytest.mark.slow),
    pytest.param("show_attend_tell", "cross_kv", None, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name,role,target", PLANTED)
def test_a_fault_is_found_in_any_graph(name, role, target, portable_bundle, tiny_checkpoint, tmp_path):
    """A weight in the middle of the graph is negated; bisecting names its node."""
    path = copy(portable_bundle(name), tmp_path)
    if target:
        build(path, graph_target(target))
    planted: list[str] = []

    def spoil(model):
        nodes = [n for n in model.graph if n.op_type in ("MatMul", "Gemm") and is_weight(n.inputs[1])]
        node = nodes[len(nodes) // 2]
        set_weight(node.inputs[1], -node.inputs[1].const_value.numpy())
        planted.append(label(node))

    edit_graph(path, role, spoil, build=target)
    report = compare(path, tiny_checkpoint(name), builds=[target or "portable"], max_new_tokens=4, store=False)
    assert report.verdict == "FAIL" and role in [one.role for one in report.builds[0].graphs if one.verdict == "FAIL"]
    culprits = {one.graph: one for one in bisect_bundle(path, tiny_checkpoint(name), report)}
    found = culprits[role]
    assert planted[0] in (found.node, *found.candidates), str(found)


def test_both_heads_of_a_captioner_are_compared(portable_bundle, tiny_checkpoint, tmp_path):
    """CoCa: captions and vectors; a wrong vector alone is enough to fail."""
    path = copy(portable_bundle("coca"), tmp_path)
    report = compare(path, tiny_checkpoint("coca"), max_new_tokens=6)
    (portable,) = report.builds
    assert [one.what for one in portable.embeddings] == ["image embeddings", "text embeddings", "similarity"]
    assert portable.verdict == "PASS", report.rows()

    def turn(model):
        weight = next(n.inputs[1] for n in model.graph if n.op_type in ("MatMul", "Gemm") and is_weight(n.inputs[1]))
        set_weight(weight, weight.const_value.numpy()[..., ::-1])

    edit_graph(path, "contrast_head", turn)
    wrong = compare(path, tiny_checkpoint("coca"), max_new_tokens=6, store=False)
    assert wrong.exit_code != 0 and wrong.builds[0].embeddings[0].verdict == "FAIL"
    assert wrong.builds[0].embeddings[1].verdict == "PASS"
