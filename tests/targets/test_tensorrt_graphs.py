"""Real bundles lowered for TensorRT's parser, natively and for TensorRT 10.3, against the portable graphs and the parser."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
import tiny

from vlm_edge.families import coverage
from vlm_edge.targets.precision import bundle_roles
from vlm_edge.targets.preflight import preflight
from vlm_edge.targets.samples import Samples, run_graph, session
from vlm_edge.targets.selfcheck import FP32_TOLERANCE, check_decoder, check_encoder
from vlm_edge.targets.target import load_target
from vlm_edge.targets.tensorrt.exactness import exact_difference
from vlm_edge.targets.tensorrt.pipeline import lower_exactly
from vlm_edge_runtime.bundle.reader import Bundle, open_bundle
from vlm_edge_runtime.errors import TargetError

CAPACITY = 40
FORMS = {"native": "rtx-40", "legacy": "jetson-orin-nano-jp62"}
"""Form of the graphs → a target that has it."""
SAME_FORM = {"native": ("jetson-orin-nano", "jetson-thor"), "legacy": ("jetson-thor-jp71",)}
"""Further TensorRT versions whose tables of imports the same graphs must pass."""
OPSETS = {"native": (23, 24), "legacy": (20, 20)}
"""Without and with a cache."""
SYSTEMS = sorted({name for one in coverage.systems() for name in one.checkpoints} | set(tiny.CHECKPOINTS))


def lowered(bundle: Bundle, role: str, form: str, capacity: int = CAPACITY) -> ir.Model:
    kind = bundle_roles(bundle.graphs)[role]
    model = ir.load(bundle.graph_path(role))
    lower_exactly(model, kind, load_target(FORMS[form]).gpu()[0], capacity=capacity if kind == "decoder" else None)
    return model


def saved(model: ir.Model, folder: Path) -> Path:
    path = folder / "graph.onnx"
    ir.save(model, path, external_data="graph.data")
    return path


def parsed(model: ir.Model, path: Path) -> list[str]:
    """What TensorRT-RTX's parser complains of; it needs no GPU."""
    trt = pytest.importorskip("tensorrt_rtx")
    said: list[str] = []

    class Listener(trt.ILogger):
        def log(self, severity, message):
            if severity <= trt.ILogger.WARNING:
                said.append(message)

    listener = Listener()
    builder = trt.Builder(listener)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, listener)
    assert parser.parse_from_file(str(path)), [parser.get_error(index).desc() for index in range(parser.num_errors)]
    names = [network.get_input(index).name for index in range(network.num_inputs)]
    assert names == [value.name for value in model.graph.inputs]
    return said


def check(bundle: Bundle, form: str, folder: Path) -> None:
    """Every graph: equal to the portable one, importable by the tables of every version, taken by the real parser."""
    samples, kinds = Samples(bundle), bundle_roles(bundle.graphs)
    for role in bundle.graphs:
        model = lowered(bundle, role, form)
        path = saved(model, folder)
        for target in (FORMS[form], *SAME_FORM[form]):
            assert preflight(model, load_target(target), role) == [], (role, target)
        assert parsed(model, path) == [], role
        cached = any(value.name.startswith("past_key_values.") for value in model.graph.inputs)
        assert model.graph.opset_imports[""] == OPSETS[form][cached]
        late = {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}
        assert form == "native" or not late & {node.op_type for node in model.graph.all_nodes()}
        values = [*model.graph.inputs, *model.graph.outputs]
        assert all(value.dtype in (ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.BOOL) for value in values)
        decoder = kinds[role] == "decoder"
        difference = check_decoder(bundle, path, samples) if decoder else check_encoder(bundle, role, path, samples)
        assert difference.relative <= FP32_TOLERANCE, role


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-clip", "idefics", "blip2-t5", "show_attend_tell"])
def test_trained_and_unusual_bundles(name, form, portable_bundle, tmp_path):
    check(open_bundle(portable_bundle(name)), form, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_checkpoint(name, form, portable_bundle, tmp_path):
    check(open_bundle(portable_bundle(name)), form, tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_the_decoders_contract(form, portable_bundle):
    model = lowered(open_bundle(portable_bundle("tiny-llava")), "decoder", form)
    inputs = {value.name: (value.dtype.numpy().name, str(value.shape)) for value in model.graph.inputs}
    assert list(inputs)[:3] == ["inputs_embeds", "position_ids", "past_lengths"]
    assert inputs["position_ids"] == ("int32", "[batch,sequence]")
    assert inputs["past_lengths"] == ("int32", "[batch]")
    assert inputs["past_key_values.3.key"] == ("float32", f"[batch,2,{CAPACITY},32]")
    outputs = {value.name: str(value.shape) for value in model.graph.outputs}
    assert outputs["logits"] == "[batch,1,512]"
    assert outputs["present.3.value"] == f"[batch,2,{CAPACITY},32]"
    assert len({node.name for node in model.graph.all_nodes()}) == sum(1 for _ in model.graph.all_nodes())


@pytest.mark.parametrize("form", FORMS)
def test_added_tokens_have_their_own_rows(form, portable_bundle, tmp_path):
    """IDEFICS' second table, with ids on both sides of its border."""
    bundle = open_bundle(portable_bundle("idefics"))
    rows = bundle.manifest.contract.vocab_size
    feeds = {"input_ids": np.array([[0, 5, rows - 2, rows - 1, rows - 3]], np.int64)}
    wanted = run_graph(session(bundle.graph_path("embed_tokens")), feeds)["inputs_embeds"]
    found = run_graph(session(saved(lowered(bundle, "embed_tokens", form), tmp_path)), feeds)["inputs_embeds"]
    assert np.array_equal(found, wanted)


def test_modules_stay_known(portable_bundle):
    """What pre-flight and the parser's messages name a node by."""
    model = lowered(open_bundle(portable_bundle("tiny-llava")), "decoder", "legacy")
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    assert softmax.metadata_props["vlm_edge.scope"].endswith("layers.0.self_attn")


def test_a_parser_that_knows_attention_alone(portable_bundle, tmp_path):
    """TensorRT 10.14 imports Attention, and neither TensorScatter nor the rest."""
    bundle = open_bundle(portable_bundle("tiny-llava"))
    device = msgspec.structs.replace(load_target("rtx-40").gpu()[0], imports=["Attention"])
    model = ir.load(bundle.graph_path("decoder"))
    lower_exactly(model, "decoder", device, capacity=CAPACITY)
    kinds = {node.op_type for node in model.graph}
    assert {"Attention", "ScatterND"} <= kinds and not kinds & {"TensorScatter", "RotaryEmbedding", "RMSNormalization"}
    assert model.graph.opset_imports[""] == 23 and parsed(model, saved(model, tmp_path)) == []
    difference = exact_difference(bundle, "decoder", "decoder", device, Samples(bundle), capacity=CAPACITY)
    assert difference.relative <= FP32_TOLERANCE


def test_a_decoder_needs_a_capacity(portable_bundle):
    model = ir.load(open_bundle(portable_bundle("tiny-llava")).graph_path("decoder"))
    with pytest.raises(TargetError, match="static capacity"):
        lower_exactly(model, "decoder", load_target("rtx-40").gpu()[0])
