"""Gemm, flattened blocks, layout pairs, cleanup and encoder attention on graphs of a few nodes."""

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import Sketch, largest_difference, ops, run

from vlm_edge.passes.cleanup import Cleanup
from vlm_edge.passes.evaluate import evaluate
from vlm_edge.passes.flatten import Unflatten
from vlm_edge.passes.fuse_skip_norm import FuseSkipNorm
from vlm_edge.passes.gemm import GemmToMatMul
from vlm_edge.passes.layout import CancelLayout
from vlm_edge.passes.multi_head_attention import LowerToMultiHeadAttention

RANDOM = np.random.default_rng(0)


def floats(*dims):
    return RANDOM.standard_normal(dims).astype(np.float32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gemm(transposed, bias):
    sketch = Sketch()
    x = sketch.input("x", ["rows", 6])
    inputs = [x, sketch.weight("w", floats(4, 6) if transposed else floats(6, 4))] + (
        [sketch.weight("b", floats(4))] if bias else []
    )
    sketch.output("y", sketch.node("Gemm", inputs, {"transB": int(transposed)}, shape=["rows", 4]))
    model, feed = sketch.model(), {"x": floats(5, 6)}
    before = run(model, feed)["y"]
    assert GemmToMatMul().apply(model).counts["Gemm → MatMul"] == 1
    assert ops(model) == ["MatMul", "Add"] if bias else ["MatMul"]
    assert largest_difference(run(model, feed)["y"], before) <= 1e-6
    assert not GemmToMatMul().apply(model)


@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}])
def test_gemm_with_factors_stays(attributes):
    sketch = Sketch()
    x = sketch.input("x", [6, 6])
    sketch.output(
        "y", sketch.node("Gemm", [x, sketch.weight("w", floats(6, 6)), sketch.weight("b", floats(6))], attributes, shape=[6, 6])
    )
    changes = GemmToMatMul().apply(sketch.model())
    assert not changes and changes.notes


def test_tied_head_is_folded():
    sketch = Sketch()
    x = sketch.input("x", ["b", "s", 6])
    table = sketch.node("Transpose", [sketch.weight("table", floats(9, 6))], {"perm": [1, 0]}, shape=[6, 9])
    sketch.output("logits", sketch.node("MatMul", [x, table], shape=["b", "s", 9]))
    model, feed = sketch.model(), {"x": floats(1, 2, 6)}
    before = run(model, feed)["logits"]
    assert GemmToMatMul().apply(model).counts["transposed weights folded"] == 1
    Cleanup().apply(model)
    assert ops(model) == ["MatMul"] and list(model.graph.initializers) == ["table.T"]
    assert largest_difference(run(model, feed)["logits"], before) <= 1e-6


def test_unflatten_needs_every_path_to_come_back():
    """A node that mixes rows inside the flattened block keeps it flattened."""
    sketch = Sketch()
    x = sketch.input("x", ["b", "s", 6])
    rows = sketch.node("Reshape", [x, sketch.weight("rows", np.array([-1, 6]))], shape=["rows", 6])
    mixed = sketch.node("Softmax", [rows], {"axis": 0}, shape=["rows", 6])
    back = sketch.node("Reshape", [mixed, sketch.weight("back", np.array([1, -1, 6]))], shape=["b", "s", 6])
    sketch.output("y", back)
    model = sketch.model()
    assert not Unflatten().apply(model)
    assert ops(model) == ["Reshape", "Softmax", "Reshape"]


def test_layout_pairs_cancel():
    sketch = Sketch()
    x = sketch.input("x", ["b", "s", 6])
    value = sketch.node("Reshape", [x, sketch.weight("split", np.array([0, 0, 2, 3]))], shape=["b", "s", 2, 3])
    value = sketch.node("Transpose", [value], {"perm": [0, 2, 1, 3]}, shape=["b", 2, "s", 3])
    value = sketch.node("Transpose", [value], {"perm": [0, 2, 1, 3]}, shape=["b", "s", 2, 3])
    value = sketch.node("Reshape", [value, sketch.weight("merge", np.array([0, 0, 6]))], shape=["b", "s", 6])
    sketch.output("y", sketch.node("Relu", [value], shape=["b", "s", 6]))
    model = sketch.model()
    assert CancelLayout().apply(model)
    assert ops(model) == ["Relu"]


def test_layout_keeps_what_it_cannot_prove():
    sketch = Sketch()
    x = sketch.input("x", ["b", "s", 6])
    value = sketch.node("Reshape", [x, sketch.weight("a", np.array([-1, 3]))], shape=["n", 3])
    value = sketch.node("Reshape", [value, sketch.weight("b", np.array([0, 1, 3]))], shape=["n", 1, 3])  # copies a dimension
    sketch.output("y", sketch.node("Relu", [value], shape=["n", 1, 3]))
    model = sketch.model()
    assert not CancelLayout().apply(model)
    assert ops(model) == ["Reshape", "Reshape", "Relu"]


def test_cleanup_merges_equal_work_and_drops_dead_work():
    sketch = Sketch()
    x = sketch.input("x", ["n"])
    first, second = (sketch.node("Cos", [x], shape=["n"]) for _ in range(2))
    sketch.node("Sin", [x], shape=["n"])
    sketch.output("y", sketch.node("Add", [sketch.node("Identity", [first], shape=["n"]), second], shape=["n"]))
    sketch.weight("unused", floats(3))
    model = sketch.model()
    assert Cleanup().apply(model)
    assert ops(model) == ["Cos", "Add"] and not model.graph.initializers
    assert not Cleanup().apply(model)


def test_evaluate_runs_a_piece_only():
    sketch = Sketch()
    x, other = sketch.input("x", ["n"]), sketch.input("other", ["n"])
    doubled = sketch.node("Mul", [x, sketch.weight("two", np.float32(2))], shape=["n"])
    sketch.output("y", sketch.node("Add", [doubled, other], shape=["n"]))
    model = sketch.model()
    (found,) = evaluate(model.graph, [doubled], {"x": np.array([1, 2], np.float32)})
    assert found.tolist() == [2, 4] and ops(model) == ["Mul", "Add"]
    with pytest.raises(ValueError, match="other"):
        evaluate(model.graph, [model.graph.outputs[0]], {"x": found})


def encoder_attention(*, mask=None, four=True, kv_heads=2, causal=0):
    sketch = Sketch()
    dims, dims_kv = (["b", 2, "s", 8], ["b", kv_heads, "s", 8]) if four else (["b", "s", 16], ["b", "s", kv_heads * 8])
    inputs = [sketch.input("q", dims), sketch.input("k", dims_kv), sketch.input("v", dims_kv)]
    if mask is not None:
        inputs.append(sketch.input("mask", ["b", 1, "s", "s"], mask))
    attributes = {"scale": 0.3, "is_causal": causal} | ({} if four else {"q_num_heads": 2, "kv_num_heads": kv_heads})
    sketch.output("y", sketch.node("Attention", inputs, attributes, shape=dims))
    return sketch.model()


@pytest.mark.parametrize("four", [True, False], ids=["4d", "3d"])
@pytest.mark.parametrize("options", [{}, {"mask": ir.DataType.FLOAT}, {"causal": 1}], ids=["full", "mask", "causal"])
def test_encoder_attention(four, options):
    model = encoder_attention(four=four, **options)
    shape = (2, 2, 5, 8) if four else (2, 5, 16)
    feed = {name: floats(*shape) for name in "qkv"} | {"mask": np.where(floats(2, 1, 5, 5) > 1, -1e9, 0).astype(np.float32)}
    before = run(model, feed)["y"]
    assert LowerToMultiHeadAttention().apply(model).counts["Attention → MultiHeadAttention"] == 1
    assert "Attention" not in ops(model) and "MultiHeadAttention" in ops(model)
    assert largest_difference(run(model, feed)["y"], before) <= 1e-5


@pytest.mark.parametrize(
    "options", [{"mask": ir.DataType.BOOL}, {"kv_heads": 1, "causal": 1}], ids=["bool mask", "grouped and causal"]
)
def test_encoder_attention_that_stays(options):
    model = encoder_attention(**options)
    changes = LowerToMultiHeadAttention().apply(model)
    assert not changes and "stays" in changes.notes[0] and ops(model) == ["Attention"]


def test_skip_norm_keeps_the_sum_for_its_other_readers():
    sketch = Sketch()
    x, y = (sketch.input(name, ["b", "s", 8]) for name in "xy")
    added = sketch.node("Add", [x, y], shape=["b", "s", 8])
    early = sketch.node("Relu", [added], shape=["b", "s", 8])
    scale, bias = sketch.weight("scale", floats(8)), sketch.weight("bias", floats(8))
    normed = sketch.node("LayerNormalization", [added, scale, bias], {"axis": -1, "epsilon": 1e-3}, shape=["b", "s", 8])
    sketch.output("out", sketch.node("Add", [early, normed], shape=["b", "s", 8]))
    model, feed = sketch.model(), {"x": floats(2, 3, 8), "y": floats(2, 3, 8)}
    before = run(model, feed)["out"]
    assert FuseSkipNorm().apply(model)
    assert largest_difference(run(model, feed)["out"], before) <= 1e-5


def test_transposes_cancel_around_a_norm_of_the_last_axis():
    """Queries normalised per head: [b, s, h, d] → [b, h, s, d] → norm → back."""
    sketch = Sketch()
    x = sketch.input("x", ["b", "s", 2, 8])
    turned = sketch.node("Transpose", [x], {"perm": [0, 2, 1, 3]}, shape=["b", 2, "s", 8])
    normed = sketch.node("RMSNormalization", [turned, sketch.weight("w", floats(8))], {"axis": -1}, shape=["b", 2, "s", 8])
    sketch.output("y", sketch.node("Relu", [sketch.node("Transpose", [normed], {"perm": [0, 2, 1, 3]}, shape=["b", "s", 2, 8])],
                                   shape=["b", "s", 2, 8]))  # fmt: skip
    model, feed = sketch.model(), {"x": floats(2, 5, 2, 8)}
    before = run(model, feed)["y"]
    assert CancelLayout().apply(model).counts["transposes around a norm"] == 1
    assert ops(model) == ["RMSNormalization", "Relu"]
    assert largest_difference(run(model, feed)["y"], before) <= 1e-6


def test_cleanup_keeps_a_second_name_of_an_output():
    """A loop's state that is also scanned out: the same value twice among the outputs is not what runtimes expect."""
    sketch = Sketch()
    y = sketch.node("Tanh", [sketch.input("x", ["rows", 4])], shape=["rows", 4])
    sketch.output("again", sketch.node("Identity", [y], shape=["rows", 4]))
    sketch.output("y", y)
    model, feed = sketch.model(), {"x": floats(3, 4)}
    before = run(model, feed)
    Cleanup().apply(model)
    assert ops(model) == ["Tanh", "Identity"]
    after = run(model, feed)
    assert largest_difference(after["y"], before["y"]) == largest_difference(after["again"], before["again"]) == 0
