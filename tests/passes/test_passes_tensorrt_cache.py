"""Decoders on a cache of static capacity, against the portable decoder on ONNX Runtime, step by step."""

import numpy as np
import onnx_ir as ir
import pytest
from small_decoder import STEPS, Shape, decoder, feeds
from small_graphs import Sketch, largest_difference, ops, run

from vlm_edge.passes.base import run_passes
from vlm_edge.passes.cleanup import Cleanup
from vlm_edge.passes.tensorrt.decompose_attention import DecomposeAttention
from vlm_edge.passes.tensorrt.lower_opset import LowerOpset
from vlm_edge.passes.tensorrt.static_cache import StaticCache
from vlm_edge.targets.steps import laid_beside, static_cache_feeds
from vlm_edge_runtime.errors import TargetError

TOLERANCE = 1e-4
CAPACITY = 48
UPDATES = ("TensorScatter", "ScatterND")

SHAPES = {
    "gqa": Shape(),
    "mha": Shape(kv_heads=4),
    "mqa": Shape(kv_heads=1),
    "odd sizes": Shape(size=20),
    "window": Shape(window=4),
    "softcap": Shape(softcap=0.5),
    "mrope": Shape(rotary="mrope"),
    "interleaved": Shape(rotary="interleaved"),
    "opt": Shape(rotary="none", norm="LayerNormalization", bias=True, gemm=True),
    "blocks": Shape(mask="blocks"),
    "blocks over a window": Shape(mask="blocks", window=3),
    "blocks within a window": Shape(mask="blocks", window=3, windowed_blocks=True),
    "t5": Shape(rotary="none", mask="explicit", bias_by="distance", kv_heads=4),
    "alibi": Shape(rotary="none", mask="explicit", bias_by="slope", kv_heads=4),
    "cross": Shape(cross=2),
    "deepstack": Shape(deepstack=True),
}


def lowered(shape: Shape, update: str, capacity: int = CAPACITY) -> ir.Model:
    model = decoder(shape)
    passes = [Cleanup(), StaticCache(capacity, update)]
    passes += [DecomposeAttention(softcap_only=True)] if update == "TensorScatter" else [DecomposeAttention()]
    changes = run_passes(model, [*passes, LowerOpset(24 if update == "TensorScatter" else 23)])
    assert changes[1].counts[f"caches by {update}"] == 2 * shape.layers
    return model


def differences(shape: Shape, model: ir.Model, steps=STEPS, padding: int = 0):
    """Largest difference of any output over the steps; `padding`: entries that the first of several rows lacks."""
    portable_model, largest = decoder(shape), 0.0
    for batch, sequence, past in steps:
        portable, _ = feeds(shape, batch=batch, sequence=sequence, past=past)
        if batch > 1 and past > padding:
            portable["attention_mask"][0, :padding] = 0
        wanted = run(portable_model, portable)
        found = run(model, static_cache_feeds(portable, capacity=CAPACITY))
        for name, got, expected in laid_beside(found, wanted, portable):
            largest = max(largest, largest_difference(got, expected))
            if name.startswith("present."):
                assert found[name].shape[2] == CAPACITY
    return largest


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_portable_decoder(shape, update):
    assert differences(shape, lowered(shape, update), padding=2) <= TOLERANCE


@pytest.mark.parametrize("update", UPDATES)
def test_rows_of_unlike_length_are_written_behind_their_own_entries(update):
    shape = Shape()
    portable, _ = feeds(shape, batch=3, sequence=2, past=9)
    portable["attention_mask"][0, :4] = 0
    found = run(lowered(shape, update), static_cache_feeds(portable, capacity=CAPACITY))
    before = static_cache_feeds(portable, capacity=CAPACITY)["past_key_values.1.key"]
    changed = (found["present.1.key"] != before).any(axis=(1, 3))
    assert [np.flatnonzero(row).tolist() for row in changed] == [[5, 6], [9, 10], [9, 10]]


def test_no_entry_is_written_outside_of_its_own_cache():
    """Beyond the capacity the result is wrong (the runtime refuses it before), but the neighbours stay as they are."""
    shape = Shape()
    _, step = feeds(shape, batch=2, sequence=4, past=20, capacity=CAPACITY)
    step["past_lengths"] = np.array([CAPACITY - 2, 20], np.int32)
    found = run(lowered(shape, "ScatterND"), step)["present.0.key"]
    changed = (found != step["past_key_values.0.key"]).any(axis=3)
    for head in range(shape.kv_heads):
        assert np.flatnonzero(changed[0, head]).tolist() == [CAPACITY - 2, CAPACITY - 1]
        assert np.flatnonzero(changed[1, head]).tolist() == [20, 21, 22, 23]


@pytest.mark.parametrize("update", UPDATES)
def test_layers_may_have_unlike_numbers_of_heads(update):
    sketch = Sketch()
    sketch.input("inputs_embeds", ["batch", "sequence", 8])
    feeds = {"inputs_embeds": np.zeros((2, 3, 8), np.float32), "past_lengths": np.array([4, 9], np.int32)}
    for layer, heads in enumerate((2, 1)):
        new = [sketch.input(f"{layer}.{name}", ["batch", n, "sequence", 8]) for name, n in (("q", 2), ("k", heads), ("v", heads))]
        past = [sketch.input(f"past_key_values.{layer}.{kind}", ["batch", heads, "past", 8]) for kind in ("key", "value")]
        shapes = [["batch", 2, "sequence", 8], *[["batch", heads, "total", 8]] * 2]
        outs = sketch.node("Attention", [*new, None, *past], {"is_causal": 1}, shapes=shapes, name=f"attention.{layer}")
        outs[0].producer().metadata_props["vlm_edge.mask"] = "causal"
        for name, value in zip((f"out.{layer}", f"present.{layer}.key", f"present.{layer}.value"), outs, strict=True):
            sketch.output(name, value)
        feeds |= {value.name: np.ones((2, 2 if "q" in value.name else heads, 3, 8), np.float32) for value in new}
        feeds |= {value.name: np.zeros((2, heads, CAPACITY, 8), np.float32) for value in past}
    model = sketch.model()
    run_passes(model, [StaticCache(CAPACITY, update), LowerOpset(24)])
    found = run(model, feeds)
    for layer, heads in enumerate((2, 1)):
        written = found[f"present.{layer}.key"].sum(axis=(1, 3)) == 8 * heads
        assert [np.flatnonzero(row).tolist() for row in written] == [[4, 5, 6], [9, 10, 11]]


@pytest.mark.parametrize("update", UPDATES)
def test_signature(update):
    model = lowered(Shape(mask="blocks"), update)
    inputs = {value.name: (value.dtype, str(value.shape)) for value in model.graph.inputs}
    assert "attention_mask" not in inputs
    assert inputs["past_lengths"] == (ir.DataType.INT32, "[batch]")
    assert inputs["past_key_values.1.value"][1] == f"[batch,2,{CAPACITY},16]"
    outputs = {value.name: str(value.shape) for value in model.graph.outputs}
    assert outputs["present.0.key"] == f"[batch,2,{CAPACITY},16]"
    names = list(inputs)
    assert names.index("past_lengths") + 1 == names.index("past_key_values.0.key")


def test_graphs_of_two_capacities_differ_in_that_number_alone():
    models = [lowered(Shape(), "TensorScatter", capacity) for capacity in (32, 64)]
    assert ops(models[0]) == ops(models[1])
    tensors = [{name: value.const_value.numpy() for name, value in model.graph.initializers.items()} for model in models]
    assert tensors[0].keys() == tensors[1].keys()
    unlike = [name for name in tensors[0] if not np.array_equal(tensors[0][name], tensors[1][name])]
    assert unlike == ["vlm_edge.slots"]


def test_the_native_form_keeps_attention_whole_and_its_cache_at_the_inputs():
    model = lowered(Shape(window=4, mask="blocks"), "TensorScatter")
    assert ops(model).count("Attention") == 2 and ops(model).count("TensorScatter") == 4
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    assert all(len(node.outputs) == 1 and len(node.inputs) == 4 for node in attentions)
    assert all(node.inputs[3].dtype == ir.DataType.BOOL for node in attentions)
    assert all(node.inputs[0].is_graph_input() for node in model.graph if node.op_type == "TensorScatter")
    assert model.graph.opset_imports[""] == 24


def test_metadata_of_attention_goes_with_what_takes_its_place():
    model = decoder(Shape())
    for node in model.graph:
        node.metadata_props["vlm_edge.scope"] = f"module.of.{node.name}"
    run_passes(model, [Cleanup(), StaticCache(CAPACITY, "ScatterND"), DecomposeAttention()])
    written = [node for node in model.graph if node.op_type in ("ScatterND", "Softmax")]
    assert len(written) == 6 and all(node.metadata_props["vlm_edge.scope"].startswith("module.of.layers.") for node in written)
    softmaxes = [node for node in written if node.op_type == "Softmax"]
    assert all(node.metadata_props["vlm_edge.precision"] == "fp32" for node in softmaxes)


def test_entries_that_are_not_written_yet_would_show():
    """The check itself: a mask that lets one slot too many through is found."""
    shape, model = Shape(), lowered(Shape(), "TensorScatter")
    seen = next(node for node in model.graph if node.op_type == "LessOrEqual")
    slots = model.graph.initializers["vlm_edge.slots"]
    late = ir.Value(name="late", const_value=ir.tensor(slots.const_value.numpy() - 1, name="late"))
    late.type, late.shape = slots.type, slots.shape
    model.graph.register_initializer(late)
    seen.replace_input_with(0, late)
    assert differences(shape, model) > 0.01


def test_a_window_of_another_size_than_the_metadata_says_is_refused():
    model = decoder(Shape(window=4))
    for node in model.graph:
        if "vlm_edge.sliding_window" in node.metadata_props:
            node.metadata_props["vlm_edge.sliding_window"] = "5"
    Cleanup().apply(model)
    with pytest.raises(TargetError, match=r"layers\.0\.attention.*is not causal with window 5"):
        StaticCache(CAPACITY).apply(model)


def test_a_bidirectional_cache_is_refused():
    model = decoder(Shape())
    for node in model.graph:
        if node.op_type == "Attention":
            node.metadata_props["vlm_edge.mask"] = "bidirectional"
    with pytest.raises(TargetError, match="a cache is read causally, or in blocks"):
        StaticCache(CAPACITY).apply(model)


def test_another_reader_of_the_mask_is_named():
    model = decoder(Shape())
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    total = ir.node("ReduceSum", [mask], name="count_tokens")
    total.outputs[0].name, total.outputs[0].dtype = "tokens", ir.DataType.INT64
    model.graph.append(total)
    model.graph.outputs.append(total.outputs[0])
    with pytest.raises(TargetError, match=r"attention_mask is read by more than the masks \(ReduceSum 'count_tokens'\)"):
        StaticCache(CAPACITY).apply(model)


def test_a_second_run_finds_nothing():
    model = lowered(Shape(), "TensorScatter")
    before = ops(model)
    assert not StaticCache(CAPACITY).apply(model)
    assert ops(model) == before
