"""What the exported graphs are made of."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import pytest
import tiny
import torch

from vlm_edge.export.trace import LAYER, MASK, OPSET, SOFTCAP, WINDOW
from vlm_edge_runtime.bundle.reader import open_bundle, read_manifest

QUICK = ["llava-llama", "llava-gemma2", "smolvlm", "qwen2_vl", "clip", "siglip"]
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in tiny.CHECKPOINTS]
JUNK = {"Loop", "If", "Scan", "NonZero", "SequenceAt", "SplitToSequence", "ScatterND", "ScatterElements", "IsNaN", "Softmax"}


PLAIN = [name for name in tiny.CHECKPOINTS if tiny.MODULES[name] in ("projector", "dual_encoder")]
"""Causal decoders and vision encoders without masks; what others read besides is tested with their families."""


@pytest.fixture(params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PLAIN])
def plain(request, portable_bundle):
    return open_bundle(portable_bundle(request.param))


@pytest.fixture(params=NAMES)
def bundle(request, portable_bundle):
    return open_bundle(portable_bundle(request.param))


def _graphs(bundle) -> dict[str, ir.Model]:
    return {role: ir.load(bundle.graph_path(role)) for role in bundle.graphs}


def test_every_graph_was_compared_and_passed(bundle):
    parity = bundle.manifest.parity
    assert parity.verdict == "PASS"
    assert [check.subject for check in parity.checks] == list(bundle.graphs)
    assert all(check.metric["scaled"] <= check.tolerance["scaled"] == 1e-4 for check in parity.checks)


def test_standard_ops_at_one_opset_and_signatures_as_recorded(bundle):
    for role, model in _graphs(bundle).items():
        assert model.opset_imports == {"": OPSET}
        entry = bundle.graphs[role]
        for values, specs in ((model.graph.inputs, entry.inputs), (model.graph.outputs, entry.outputs)):
            assert [value.name for value in values] == [spec.name for spec in specs]
            assert [tuple(str(d) for d in value.shape) for value in values] == [tuple(map(str, spec.shape)) for spec in specs]
        assert entry.nodes == sum(1 for _ in model.graph.all_nodes())


def test_no_path_of_this_machine_is_kept(bundle):
    for role in bundle.graphs:
        data = bundle.graph_path(role).read_bytes()
        assert b"site-packages" not in data
        assert b"pkg.torch" not in data


def test_decoder_is_one_attention_per_layer(plain):
    bundle = plain
    if "decoder" not in bundle.graphs:
        pytest.skip("no decoder")
    graph = _graphs(bundle)["decoder"].graph
    counts = Counter(node.op_type for node in graph)
    layers = bundle.manifest.contract.kv.layers
    assert counts["Attention"] == layers
    assert not JUNK & set(counts)
    assert counts["Where"] <= 2  # one mask, and one for sliding layers
    attentions = [node for node in graph if node.op_type == "Attention"]
    for index, node in enumerate(attentions):
        assert node.metadata_props[LAYER] == str(index)
        assert node.metadata_props[MASK] == "causal"
        assert [value.name for value in node.inputs[4:6]] == [f"past_key_values.{index}.{part}" for part in ("key", "value")]
        assert [value.name for value in node.outputs[1:3]] == [f"present.{index}.{part}" for part in ("key", "value")]


def test_vision_encoders_attend_through_attention_ops(plain):
    graph = _graphs(plain)["vision_encoder"].graph
    attentions = [node for node in graph if node.op_type == "Attention"]
    assert attentions
    assert all(node.metadata_props[MASK] == "bidirectional" for node in attentions)
    assert not any(len(node.inputs) > 3 and node.inputs[3] is not None for node in attentions)  # nothing to mask


@pytest.mark.parametrize(
    ("name", "windows", "caps"),
    [
        ("llava-gemma2", [str(tiny.WINDOW), None], ["2.0", "2.0"]),
        ("llava-llama", [None, None], [None, None]),
        pytest.param("llava-mistral", [str(tiny.WINDOW)] * 2, [None, None], marks=pytest.mark.slow),
        pytest.param("llava-gemma3", [str(tiny.WINDOW), None], [None, None], marks=pytest.mark.slow),
    ],
)
def test_window_and_softcap_stand_on_the_node(portable_bundle, name, windows, caps):
    graph = ir.load(open_bundle(portable_bundle(name)).graph_path("decoder")).graph
    attentions = [node for node in graph if node.op_type == "Attention"]
    assert [node.metadata_props.get(WINDOW) for node in attentions] == windows
    assert [node.metadata_props.get(SOFTCAP) for node in attentions] == caps


def test_weights_are_stored_once(portable_bundle, tiny_checkpoint):
    from transformers import AutoModelForImageTextToText

    path = portable_bundle("llava-llama")  # its lm_head is tied to the embedding table
    manifest = read_manifest(path)
    files = {ref.file for entry in manifest.graphs.values() for ref in entry.data}
    assert len(files) == 1
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint("llava-llama"), dtype=torch.float32)
    whole = sum(parameter.numel() * 4 for parameter in model.parameters())
    stored = (path / files.pop()).stat().st_size
    pages = 4096 * sum(1 for _ in model.parameters())
    assert stored <= whole + pages
    decoder = ir.load(path / "portable" / "decoder.onnx")
    table = ir.load(path / "portable" / "embed_tokens.onnx").graph.initializers["model.language_model.embed_tokens.weight"]
    head = next(node for node in decoder.graph if node.outputs[0].name == "logits").inputs[1]
    assert head.producer().op_type == "Transpose"
    assert head.producer().inputs[0].const_value.offset == table.const_value.offset


def test_weights_carry_their_names_and_numbers(portable_bundle, tiny_checkpoint):
    from safetensors.torch import load_file

    checkpoint = load_file(tiny_checkpoint("llava-llama") / "model.safetensors")
    decoder = ir.load(portable_bundle("llava-llama") / "portable" / "decoder.onnx").graph
    for layer in range(tiny.LAYERS):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            stored = next(weight for key, weight in checkpoint.items() if key.endswith(f"{layer}.{name}.weight"))
            found = decoder.initializers[f"model.language_model.layers.{layer}.{name}.weight.T"].const_value.numpy()
            assert torch.equal(torch.from_numpy(found.copy()), stored.t())
