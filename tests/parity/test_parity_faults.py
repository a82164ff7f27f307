"""One fault at a time is planted in a copy of a bundle: the verdict is FAIL, and the right place is named."""

from __future__ import annotations

import json

import msgspec
import pytest
from graph_targets import graph_target
from planted import copy, edit_graph, edit_json, matmul, set_epsilon, set_weight, zero_block

from vlm_edge.parity import bisect_bundle, compare, first_divergence
from vlm_edge.parity.examples import built_in
from vlm_edge.parity.graphs import PortableReference, lower_row, single_step
from vlm_edge.parity.metrics import UNBOUNDED
from vlm_edge.parity.pairs import pair_values
from vlm_edge.parity.probe import Probe
from vlm_edge.parity.report import LogitsResult
from vlm_edge.targets.build import build
from vlm_edge_runtime.bundle.reader import open_bundle, read_manifest
from vlm_edge_runtime.bundle.writer import file_ref, update_manifest

LAYER = "model.language_model.layers.1"
EXAMPLES = built_in()[:2]


@pytest.fixture
def llava(portable_bundle, tmp_path):
    return copy(portable_bundle("llava-llama"), tmp_path)


@pytest.fixture(scope="module")
def lowered(portable_bundle, tmp_path_factory):
    """With a build in fp32; it is shared: copy it before changing it."""
    bundle = copy(portable_bundle("llava-llama"), tmp_path_factory.mktemp("lowered"))
    build(bundle, graph_target("cpu-fp32"))
    return bundle


def norm(model, scope):
    return next(
        node for node in model.graph if "Normalization" in node.op_type and node.metadata_props["vlm_edge.scope"] == scope
    )


def failed(report, name="portable"):
    return {check.subject for check in next(b for b in report.builds if b.name == name).checks() if check.verdict == "FAIL"}


def checked(bundle, reference, store=False, **options):
    report = compare(bundle, reference, examples=EXAMPLES, max_new_tokens=6, store=store, **options)
    return report, bisect_bundle(bundle, reference, report)


@pytest.mark.parametrize(
    ("role", "scope"),
    [
        ("decoder", f"{LAYER}.mlp.up_proj"),
        ("decoder", f"{LAYER}.self_attn.k_proj"),
        ("vision_encoder", "model.vision_tower.encoder.layers.0.mlp.fc1"),
        ("projector", "model.multi_modal_projector.linear_2"),
    ],
)
def test_a_zeroed_block_of_a_weight(llava, tiny_checkpoint, role, scope):
    planted = []

    def plant(model):
        node = matmul(model, scope)
        zero_block(node)
        planted.append(node.name)

    edit_graph(llava, role, plant)
    report, culprits = checked(llava, tiny_checkpoint("llava-llama"), builds=["portable"])
    assert report.verdict == "FAIL" and report.exit_code == 1
    assert {role, "logits"} <= failed(report)
    assert [(one.graph, one.node, one.module) for one in culprits] == [(role, planted[0], scope)]
    assert "of them zero" in culprits[0].reason
    assert culprits[0].before.within(1e-4) and not culprits[0].after.within(1e-4)


@pytest.mark.parametrize(
    ("role", "scope"),
    [
        ("decoder", f"{LAYER}.post_attention_layernorm"),
        ("vision_encoder", "model.vision_tower.encoder.layers.0.layer_norm2"),
    ],
)
def test_a_swapped_epsilon(llava, tiny_checkpoint, role, scope):
    planted = []

    def plant(model):
        node = norm(model, scope)
        set_epsilon(node, 0.1)
        planted.append(node.name)

    edit_graph(llava, role, plant)
    report, culprits = checked(llava, tiny_checkpoint("llava-llama"), builds=["portable"])
    assert role in failed(report)
    assert [(one.graph, one.node, one.module) for one in culprits] == [(role, planted[0], scope)]
    assert "epsilon" in culprits[0].reason and "0.1" in culprits[0].reason


def test_a_wrong_image_mean_points_at_preprocessing(llava, tiny_checkpoint):
    edit_json(llava, "preprocessor_config.json", image_mean=[0.9, 0.1, 0.5])
    report, culprits = checked(llava, tiny_checkpoint("llava-llama"), builds=["portable"])
    assert "preprocessing" in failed(report)
    assert failed(report).isdisjoint({"vision_encoder", "projector", "decoder", "embed_tokens"})
    assert [(one.graph, one.node) for one in culprits] == [("preprocessing", "preprocessor_config.json")]
    assert "image_mean is [0.9, 0.1, 0.5]" in culprits[0].reason


def test_a_wrong_image_mean_in_the_processor_file(portable_bundle, tiny_checkpoint, tmp_path):
    """As in transformers, options that stand there go before those of the other file; an exported bundle has none there."""
    bundle = copy(portable_bundle("tiny-llava"), tmp_path)
    assert "image_processor" not in json.loads((bundle / "processor_config.json").read_text())
    options = json.loads((bundle / "preprocessor_config.json").read_text())
    edit_json(bundle, "processor_config.json", image_processor={**options, "image_mean": [0.9, 0.1, 0.5]})
    report, culprits = checked(bundle, tiny_checkpoint("tiny-llava"), builds=["portable"])
    assert "preprocessing" in failed(report)
    assert [(one.graph, one.node) for one in culprits] == [("preprocessing", "processor_config.json")]
    assert "image_mean is [0.9, 0.1, 0.5]" in culprits[0].reason


def test_a_wrong_image_mean_of_a_dual_encoder(portable_bundle, tiny_checkpoint, tmp_path):
    clip = copy(portable_bundle("clip"), tmp_path)
    edit_json(clip, "preprocessor_config.json", image_mean=[0.9, 0.1, 0.5])
    report = compare(clip, tiny_checkpoint("clip"), store=False)
    assert {"preprocessing", "image embeddings"} <= failed(report)
    assert "text embeddings" not in failed(report)


def test_a_wrong_chat_template(llava, tiny_checkpoint):
    template = llava / "chat_template.jinja"
    template.write_text(template.read_text().replace("ASSISTANT:", "ASSISTANT :"))

    def record(manifest):
        manifest.files = [file_ref(llava, ref.file) for ref in manifest.files]

    update_manifest(llava, record)
    report, _ = checked(llava, tiny_checkpoint("llava-llama"), builds=["portable"])
    found = report.builds[0].preprocessing
    assert found.verdict == "FAIL" and found.tokens_differ == len(EXAMPLES)
    assert "chat template" in found.note


def test_weights_that_are_not_a_number(llava, tiny_checkpoint):
    def plant(model):
        weight = matmul(model, f"{LAYER}.mlp.gate_proj").inputs[1]
        set_weight(weight, weight.const_value.numpy() * float("nan"))

    edit_graph(llava, "decoder", plant)
    report, culprits = checked(llava, tiny_checkpoint("llava-llama"), store=True)
    assert {"decoder", "logits", "greedy text"} <= failed(report)
    assert read_manifest(llava).parity.verdict == "FAIL"  # a manifest with a NaN in it could not be read again
    assert msgspec.convert(json.loads(report.to_json())["builds"][0]["logits"], LogitsResult).mean_kl == UNBOUNDED
    assert culprits[0].module == f"{LAYER}.mlp.gate_proj"
    assert '"verdict": "FAIL"' in report.to_json()


@pytest.mark.parametrize("against_pytorch", [True, False])
def test_faults_in_a_build(lowered, tiny_checkpoint, tmp_path, against_pytorch):
    bundle = copy(lowered, tmp_path)
    planted = []

    def plant(model):
        node = matmul(model, f"{LAYER}.mlp.up_proj")
        zero_block(node)
        planted.append(node.name)

    edit_graph(bundle, "decoder", plant, build="cpu-fp32")
    reference = tiny_checkpoint("llava-llama") if against_pytorch else None
    report, culprits = checked(bundle, reference)
    assert {"decoder", "logits"} <= failed(report, "cpu-fp32")
    assert [(one.build, one.graph, one.node) for one in culprits] == [("cpu-fp32", "decoder", planted[0])]
    if against_pytorch:
        assert report.builds[0].verdict == "PASS"


def test_a_swapped_epsilon_in_a_build(lowered, tmp_path):
    bundle = copy(lowered, tmp_path)
    planted = []

    def plant(model):
        # The plain and the fused normalisations are both called ...Normalization.
        node = [node for node in model.graph if "Normalization" in node.op_type][2]
        set_epsilon(node, 0.1)
        planted.append(node.name or f"{node.op_type} of {node.outputs[0].name}")

    edit_graph(bundle, "decoder", plant, build="cpu-fp32")
    _, culprits = checked(bundle, None)
    assert [one.node for one in culprits] == planted
    assert "epsilon" in culprits[0].reason or culprits[0].op.startswith("Skip")


def test_a_fault_in_a_quantised_build(portable_bundle, tmp_path):
    """On trained weights, where 4-bit error leaves the answers alone and a fault does not."""
    bundle = copy(portable_bundle("tiny-llava"), tmp_path)
    build(bundle, graph_target("cpu-int8"))
    sound = compare(bundle, None, examples=EXAMPLES, max_new_tokens=6, store=False)
    assert "logits" not in failed(sound, "cpu-int8")
    planted = []

    def plant(model):
        node = next(
            node
            for node in model.graph
            if node.op_type == "MatMulNBits" and node.metadata_props.get("vlm_edge.scope") == f"{LAYER}.mlp.down_proj"
        )
        scales = node.inputs[2]
        array = scales.const_value.numpy().copy()
        set_weight(scales, array * 8)
        planted.append(node.name)

    edit_graph(bundle, "decoder", plant, build="cpu-int8")
    report, culprits = checked(bundle, None)
    assert "logits" in failed(report, "cpu-int8")
    assert [one.node for one in culprits] == planted


def test_no_node_of_a_sound_build_is_suspected(lowered):
    """Every value that is paired with a portable one agrees with it: the pairing itself raises no alarm."""
    portable, built = open_bundle(lowered), open_bundle(lowered, build="cpu-fp32")
    for role in built.build.graphs:
        cases = list(PortableReference(portable).graph_cases(role))
        case = single_step(cases) if role == "decoder" else cases[-1]
        feeds = lower_row(case, 0, built.graphs[role]) if role == "decoder" else case.feeds
        paths = portable.graph_path(role), built.graph_path(role)
        assert first_divergence(*paths, case.feeds, 1e-4, suspect_feeds=feeds) is None
        paired = pair_values(*map(Probe, paths))
        computed = [node.name for node in Probe(paths[1]).nodes if node.outputs[0].name in paired]
        assert sum("linear" in name or "MatMul" in name for name in computed) >= 5


def test_nothing_is_bisected_where_nothing_failed(llava, tiny_checkpoint):
    report, culprits = checked(llava, tiny_checkpoint("llava-llama"))
    assert report.verdict == "PASS" and report.exit_code == 0
    assert culprits == []
