"""Graphs of every role a family may invent: their precision, and inputs to try them on."""

import numpy as np
import onnx_ir as ir
import pytest
from sketch_bundle import SHAPE, embedding, encoder, projector, projector_contract, write_bundle
from small_decoder import decoder
from small_graphs import Sketch

from vlm_edge.targets import load_target, resolve_precision
from vlm_edge.targets.build import build
from vlm_edge.targets.id_limits import id_limits
from vlm_edge.targets.precision import bundle_roles
from vlm_edge.targets.samples import Samples, run_graph, session
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.errors import TargetError


def qformer(width: int = 64) -> ir.Model:
    """image_hidden_states, qformer_input_ids (8 words) → query_output."""
    random = np.random.default_rng(9)
    sketch = Sketch()
    hidden = sketch.input("image_hidden_states", ["images", 4, width])
    ids = sketch.input("qformer_input_ids", ["images", "instruction"], ir.DataType.INT64)
    sketch.input("qformer_attention_mask", ["images", "instruction"], ir.DataType.INT64)
    table = sketch.weight("words", random.standard_normal((8, width)).astype(np.float32))
    looked = sketch.node("Gather", [table, ids], {"axis": 0}, shape=["images", "instruction", width])
    axis = sketch.weight("axis", np.array([1]))
    text = sketch.node("ReduceMean", [looked, axis], {"keepdims": 1}, shape=["images", 1, width])
    both = sketch.node("Add", [hidden, text], shape=["images", 4, width])
    matrix = sketch.weight("matrix", random.standard_normal((width, width)).astype(np.float32) / 8)
    sketch.output("query_output", sketch.node("MatMul", [both, matrix], shape=["images", 4, width]))
    return sketch.model()


def rename(model: ir.Model, **names: str) -> ir.Model:
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = names.get(value.name, value.name)
    return model


def tokenizer(width: int = 64, codes: int = 12) -> ir.Model:
    """pixel_values → image_codes: the nearest of `codes` directions."""
    sketch = Sketch()
    pixels = sketch.input("pixel_values", ["images", 4, width])
    book = sketch.weight("book", np.random.default_rng(3).standard_normal((width, codes)).astype(np.float32))
    near = sketch.node("MatMul", [pixels, book], shape=["images", 4, codes])
    best = sketch.node("ArgMax", [near], {"axis": -1, "keepdims": 0}, shape=["images", 4], dtype=ir.DataType.INT64)
    sketch.output("image_codes", best)
    return sketch.model()


@pytest.fixture
def bundle(tmp_path):
    """vision_encoder → qformer → projector, and two graphs that nothing is known about."""
    graphs = {
        "vision_encoder": encoder("image_hidden_states"),
        "qformer": qformer(),
        "projector": rename(projector(), image_hidden_states="query_output"),
        "vq": tokenizer(),
        "state_encoder": rename(projector(), image_hidden_states="states", image_features="state_features"),
        "embed_tokens": embedding(SHAPE.vocab, SHAPE.width),
        "decoder": decoder(SHAPE),
    }
    contract = projector_contract()
    contract.modalities[0].graphs = ["vision_encoder", "qformer", "projector"]
    return write_bundle(tmp_path / "roles.vlm", graphs, contract)


def test_any_role_is_built_as_an_encoder(bundle):
    made = build(bundle, "cpu-int4")
    assert {role: entry.precision for role, entry in made.graphs.items()} == {
        "vision_encoder": "int8",
        "qformer": "int8",
        "projector": "int8",
        "state_encoder": "int8",
        "embed_tokens": "int8",
        "decoder": "int4",
    }
    assert made.precision["vq"] == "fp32", "what gives codes is not quantised"


def test_a_role_of_the_bundle_has_a_precision_of_its_own(bundle):
    made = build(bundle, "cpu-fp32", precision="qformer=int4,vision=int8w")
    assert made.graphs["qformer"].precision == "int4" and made.graphs["vision_encoder"].precision == "int8w"
    assert made.precision["projector"] == "fp32"
    everything = build(bundle, "cpu-fp32", precision="int8", name="all").precision
    assert everything.pop("vq") == "fp32" and set(everything.values()) == {"int8"}


@pytest.mark.parametrize(
    "precision,message",
    [
        ("qfromer=int4", r"Did you mean 'qformer'\? There is: vision_encoder, qformer, projector, vq,"),
        ("text_encoder=int8", "unknown graph 'text_encoder'"),
        ("vq=int8", "its output is codes"),
        ("state_encoder=fp16", "slower than fp32"),
    ],
)
def test_a_typo_is_refused(bundle, precision, message):
    with pytest.raises(TargetError, match=message):
        build(bundle, "cpu-fp32", precision=precision)
    assert not (bundle / "builds").exists()


def test_a_target_may_name_any_role(bundle, tmp_path):
    file = tmp_path / "robot.toml"
    file.write_text('name = "robot"\nextends = "cpu-int4"\n[precision]\nqformer = "fp32"\n')
    words = resolve_precision(load_target(file).precision, None, bundle_roles(open_bundle(bundle).graphs))
    assert words["qformer"] == "fp32" and words["vision_encoder"] == "int8" and words["vq"] == "fp32"


def test_samples_pass_through_earlier_graphs(bundle):
    samples = Samples(open_bundle(bundle))
    assert id_limits(open_bundle(bundle).graph_path("qformer")) == {"qformer_input_ids": 8}
    feeds = samples.inputs("qformer")
    assert feeds["qformer_input_ids"].max() < 8 and feeds["image_hidden_states"].shape == (2, 4, 64)
    assert feeds["qformer_attention_mask"].shape == feeds["qformer_input_ids"].shape
    given = run_graph(session(open_bundle(bundle).graph_path("qformer")), feeds)["query_output"]
    assert np.array_equal(samples.inputs("projector")["query_output"], given), "what the Q-Former gives, not noise"
    assert np.array_equal(Samples(open_bundle(bundle)).inputs("qformer")["image_hidden_states"], feeds["image_hidden_states"])
