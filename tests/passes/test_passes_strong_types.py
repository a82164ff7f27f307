"""fp16 and bf16 graphs with fp32 islands, and the twin that rounds as they do."""

import numpy as np
import onnx_ir as ir
import pytest
import small_decoder
from small_graphs import Sketch, largest_difference, ops, run

from vlm_edge.passes import strong_types
from vlm_edge.passes.cleanup import Cleanup
from vlm_edge.passes.half_twin import choose_islands, half_twin, name_nodes, overflowing_nodes, run_model
from vlm_edge.passes.last_token import LastTokenLogits
from vlm_edge.passes.strong_types import FULL_OUTPUTS, PRECISION, Islands, StrongTypes

NONE = Islands(norms=False, softmax=False)
FULL, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 5, 64)).astype(np.float32)
DIMS = ["batch", "sequence", 64]


def matrix(scale=1.0):
    return (np.random.default_rng(3).standard_normal((64, 64)) / 8 * scale).astype(np.float32)


def block(*, weight_scale=1.0, constant=None):
    """x → linear layer → LayerNormalization → linear layer → softmax → y, and the norm's result as logits."""
    sketch = Sketch()
    x = sketch.input("x", DIMS)
    value = sketch.node("MatMul", [x, sketch.weight("first", matrix(weight_scale))], shape=DIMS, name="first")
    if constant is not None:
        value = sketch.node("Mul", [value, sketch.weight("constant", np.array(constant, np.float32))], shape=DIMS, name="scaled")
    norm = [sketch.weight("gain", np.ones(64, np.float32)), sketch.weight("shift", np.zeros(64, np.float32))]
    normed = sketch.node("LayerNormalization", [value, *norm], {"axis": -1}, shape=DIMS, name="norm")
    out = sketch.node("MatMul", [normed, sketch.weight("second", matrix())], shape=DIMS, name="second")
    sketch.output("logits", normed)
    sketch.output("y", sketch.node("Softmax", [out], {"axis": -1}, shape=DIMS, name="softmax"))
    return sketch.model()


def rms_norm():
    """x / sqrt(mean(x²) + ε) · gain, decomposed as for a parser without the operator."""
    sketch = Sketch()
    x = sketch.input("x", DIMS)
    square = sketch.node("Mul", [x, x], shape=DIMS, name="square")
    mean = sketch.node("ReduceMean", [square, sketch.weight("axis", np.array([-1]))], shape=["batch", "sequence", 1], name="mean")
    small = sketch.node("Add", [mean, sketch.weight("small", np.array(1e-6, np.float32))], shape=["batch", "sequence", 1])
    root = sketch.node("Sqrt", [small], shape=["batch", "sequence", 1])
    scaled = sketch.node("Div", [x, root], shape=DIMS, name="scaled")
    gain = sketch.weight("gain", np.ones(64, np.float32))
    sketch.output("y", sketch.node("Mul", [scaled, gain], shape=DIMS, name="gain"))
    return sketch.model()


def dtypes(model):
    return {node.name: node.outputs[0].dtype for node in model.graph if node.name}


def twin_of(model, islands=None, **options):
    StrongTypes(islands=islands, **options).apply(model)
    return half_twin(model)


@pytest.mark.parametrize("half,dtype,bound", [("fp16", HALF, 2e-3), ("bf16", ir.DataType.BFLOAT16, 2e-2)])
def test_types_of_a_block(half, dtype, bound):
    model = block()
    changes = StrongTypes(half).apply(model)
    named = dtypes(model)
    assert named["first"] == named["second"] == dtype
    assert named["norm"] == named["softmax"] == FULL, "islands"
    assert {value.name: value.dtype for value in model.graph.inputs} == {"x": dtype}
    assert {value.name: value.dtype for value in model.graph.outputs} == {"logits": FULL, "y": dtype}
    assert set(model.graph.initializers) == {f"first.{half}", "gain", "shift", f"second.{half}"}, "no weight is kept twice"
    assert isinstance(model.graph.initializers[f"first.{half}"].const_value, ir.LazyTensor), "converted when saved"
    assert changes.counts["nodes in fp32 islands"] == 2 and ops(model).count("Cast") == 4, "into and out of each island"
    assert not StrongTypes(half).apply(model), "a typed graph stays as it is"
    wanted, found = run(block(), {"x": X}), run(half_twin(model), {"x": X})
    for name, array in wanted.items():
        assert 0 < largest_difference(found[name], array) <= bound * np.abs(array).max()


def test_the_typed_graph_itself_runs():
    """ONNX Runtime checks types when it loads a graph."""
    model = block()
    StrongTypes().apply(model)
    found = run(model, {"x": X.astype(np.float16)})
    assert found["y"].dtype == np.float16 and found["logits"].dtype == np.float32


def test_inputs_that_stay_full():
    model = block()
    StrongTypes(full_inputs={"x"}, full_outputs={"y"}).apply(model)
    assert [value.dtype for value in model.graph.inputs] == [FULL]
    assert {value.name: value.dtype for value in model.graph.outputs} == {"logits": HALF, "y": FULL}
    assert run(model, {"x": X})["logits"].dtype == np.float16


def test_islands_by_name_and_by_mark():
    model = block()
    next(node for node in model.graph if node.name == "second").metadata_props[PRECISION] = "fp32"
    StrongTypes(islands=Islands(norms=False, softmax=False, nodes=frozenset({"first"}))).apply(model)
    named = dtypes(model)
    assert named["first"] == named["second"] == FULL and named["norm"] == named["softmax"] == HALF


def test_the_twin_rounds_where_onnx_runtime_does_not():
    """(x + 4096) − 4096 in fp16 keeps multiples of 4 only; ONNX Runtime's CPU provider computes it in fp32 throughout."""
    sketch = Sketch()
    big = sketch.weight("big", np.array(4096.0, np.float32))
    x = sketch.input("x", [4])
    sketch.output("y", sketch.node("Sub", [sketch.node("Add", [x, big], shape=[4]), big], shape=[4]))
    model = sketch.model()
    StrongTypes(islands=NONE).apply(model)
    values = np.array([1.0, 3.0, 5.0, 100.0], np.float32)
    twin = run_model(half_twin(model), [{"x": values}])[0]["y"]
    half = values.astype(np.float16) + np.float16(4096) - np.float16(4096)
    assert np.array_equal(twin, half.astype(np.float32)) and not np.array_equal(twin, values)


def test_a_weight_beyond_fp16_stays():
    model = block(constant=1e5)
    changes = StrongTypes().apply(model)
    assert changes.notes == ["scaled: stays fp32: constant reaches 100000, fp16 ends at 65504"]
    assert dtypes(model)["scaled"] == FULL
    assert largest_difference(run(half_twin(model), {"x": X})["logits"], run(block(constant=1e5), {"x": X})["logits"]) <= 2e-2
    wide = block(constant=1e5)
    assert not StrongTypes("bf16").apply(wide).notes, "bf16 reaches as far as fp32"


def test_decomposed_norm_is_an_island():
    """Squares of 300 are beyond fp16."""
    given = {"x": X * 300}
    wanted = run(rms_norm(), given)["y"]
    assert not np.isfinite(run(twin_of(rms_norm(), NONE), given)["y"]).all() or (
        largest_difference(run(twin_of(rms_norm(), NONE), given)["y"], wanted) > 0.1
    ), "the planted overflow shows"
    model = rms_norm()
    StrongTypes().apply(model)
    named = dtypes(model)
    assert named["square"] == named["mean"] == named["scaled"] == FULL and named["gain"] == HALF
    assert largest_difference(run(half_twin(model), given)["y"], wanted) <= 2e-3 * np.abs(wanted).max()


def test_islands_are_chosen_by_trial():
    feeds = [{"x": X * 300}]
    chosen, tried = choose_islands(rms_norm, feeds)
    assert chosen == Islands(norms=True, softmax=False)
    assert [one.relative > 1e-2 for one in tried] == [True, True, False], "the fastest first, and no more than it takes"
    assert choose_islands(rms_norm, [{"x": X}])[0] == NONE


def test_nodes_that_overflow_become_islands():
    def make():
        model = block(weight_scale=1e5)
        name_nodes(model.graph)
        return model

    assert overflowing_nodes(make(), [{"x": X}]) == {"first"}
    chosen, tried = choose_islands(make, [{"x": X}])
    assert "first" in chosen.nodes and tried[-1].relative <= 1e-2 < tried[0].relative
    assert tried[0].cosine == -1.0, "infinity is infinitely far"


def test_decomposed_softmax_is_an_island():
    """Scores, scale and mask in fp32 between the product and the softmax."""
    sketch = Sketch()
    x, mask = sketch.input("x", DIMS), sketch.input("seen", [1, "sequence", "sequence"], ir.DataType.BOOL)
    dims = ["batch", "sequence", "sequence"]
    turned = sketch.node("Transpose", [x], {"perm": [0, 2, 1]}, shape=["batch", 64, "sequence"])
    scores = sketch.node("MatMul", [x, turned], shape=dims, name="scores")
    scaled = sketch.node("Mul", [scores, sketch.weight("scale", np.array(0.125, np.float32))], shape=dims, name="scaled")
    off, on = (sketch.weight(name, np.array(v, np.float32)) for name, v in (("off", np.finfo(np.float32).min), ("on", 0)))
    added = sketch.node("Add", [scaled, sketch.node("Where", [mask, on, off], shape=dims)], shape=dims, name="masked")
    weights = sketch.node("Softmax", [added], {"axis": -1}, shape=dims, name="softmax")
    sketch.output("y", sketch.node("MatMul", [weights, x], shape=DIMS, name="values"))
    model = sketch.model()
    seen = np.tril(np.ones((1, 5, 5), bool))
    wanted = run(model, {"x": X, "seen": seen})["y"]
    StrongTypes().apply(model)
    named = dtypes(model)
    assert named["scaled"] == named["masked"] == named["softmax"] == FULL and named["scores"] == named["values"] == HALF
    assert largest_difference(run(half_twin(model), {"x": X, "seen": seen})["y"], wanted) <= 3e-3


def masked_attention():
    """Attention whose mask hides every key of the last query."""
    sketch = Sketch()
    parts = [sketch.input(name, [1, 2, 4, 16]) for name in "qkv"]
    seen = sketch.input("seen", [1, 1, 4, 4], ir.DataType.BOOL)
    off = sketch.weight("off", np.array(np.finfo(np.float32).min, np.float32))
    on = sketch.weight("on", np.array(0, np.float32))
    mask = sketch.node("Where", [seen, on, off], shape=[1, 1, 4, 4], name="mask")
    sketch.output("y", sketch.node("Attention", [*parts, mask], shape=[1, 2, 4, 16], name="attention"))
    return sketch.model()


def test_a_query_without_keys_is_not_nan():
    model = masked_attention()
    StrongTypes().apply(model)
    assert ops(model) == ["Where", "Max", "Cast", "Attention"], "a mask is clipped before it is cast"
    seen = np.tril(np.ones((1, 1, 4, 4), bool))
    seen[..., -1, :] = False
    given = {name: RANDOM.standard_normal((1, 2, 4, 16)).astype(np.float32) for name in "qkv"} | {"seen": seen}
    found, wanted = run(half_twin(model), given)["y"], run(masked_attention(), given)["y"]
    assert np.isfinite(found).all(), "the row that sees nothing included"
    assert largest_difference(found[:, :, :-1], wanted[:, :, :-1]) <= 5e-3


def portable(shape):
    model = small_decoder.decoder(shape)
    Cleanup().apply(model)
    LastTokenLogits().apply(model)
    return model


def decoder_difference(shape, offset):
    feeds, _ = small_decoder.feeds(shape, sequence=4, past=6, offset=offset)
    wanted = run(portable(shape), feeds)["logits"]
    found = run(twin_of(portable(shape)), feeds)["logits"]
    return largest_difference(found, wanted) / np.abs(wanted).max()


def test_positions_stay_exact(monkeypatch):
    """fp16 knows no 5,001: rotary tables are computed in fp32 from whole numbers, at any position."""
    shape = small_decoder.Shape()
    assert decoder_difference(shape, offset=5001) <= 1e-2
    monkeypatch.setattr(strong_types, "exact_values", lambda graph: set())
    assert not decoder_difference(shape, offset=5001) <= 1e-2, "the planted mistake shows"


@pytest.mark.parametrize(
    "shape",
    [
        small_decoder.Shape(window=4, softcap=20.0),
        small_decoder.Shape(norm="LayerNormalization", bias=True, gemm=True, rotary="none"),
        small_decoder.Shape(mask="blocks", rotary="mrope"),
        small_decoder.Shape(mask="explicit", bias_by="distance", rotary="none"),
        small_decoder.Shape(cross=2, deepstack=True),
    ],
    ids=["window", "gemm", "blocks", "bias", "cross"],
)
def test_decoders(shape):
    assert decoder_difference(shape, offset=0) <= 1e-2
    model = portable(shape)
    StrongTypes().apply(model)
    kinds = {value.name: value.dtype for value in [*model.graph.inputs, *model.graph.outputs]}
    assert kinds["logits"] == FULL and kinds["inputs_embeds"] == kinds["present.0.key"] == HALF
    assert {str(value.dtype) for value in model.graph.inputs} <= {"FLOAT16", "INT64"}
    products = [node.outputs[0].dtype for node in model.graph if node.op_type in ("MatMul", "Attention")]
    assert len(products) > 8 and products.count(FULL) <= 2, "only the rotary tables' own products are full"


def test_soft_capped_logits_end_in_fp32():
    sketch = Sketch()
    x = sketch.input("x", DIMS)
    value = sketch.node("MatMul", [x, sketch.weight("head", matrix())], shape=DIMS, name="head")
    cap = sketch.weight("cap", np.array(30.0, np.float32))
    for op, name in (("Div", "down"), ("Tanh", "cap"), ("Mul", "up")):
        value = sketch.node(op, [value, cap] if op != "Tanh" else [value], shape=DIMS, name=name)
    sketch.output("logits", value)
    model = sketch.model()
    StrongTypes().apply(model)
    assert dtypes(model) == {"head": HALF, "down": FULL, "cap": FULL, "up": FULL} | {
        node.name: FULL for node in model.graph if node.op_type == "Cast"
    }
    assert "logits" in FULL_OUTPUTS


def test_a_loop_stays_fp32():
    body_in = [ir.Value(name=name, type=ir.TensorType(FULL), shape=ir.Shape([64])) for name in ("state", "row")]
    sketch = Sketch()
    x, start = sketch.input("x", ["rows", 64]), sketch.input("state.0", [64])
    wide = sketch.node("MatMul", [x, sketch.weight("weight", matrix())], shape=["rows", 64], name="product")
    bias = sketch.node("Add", [start, start], shape=[64], name="twice")
    inner = ir.node("Add", [body_in[0], body_in[1]])
    again = ir.node("Add", [inner.outputs[0], bias])  # read from outside
    out = ir.node("Identity", [again.outputs[0]])
    for node, name in ((inner, "inner"), (again, "again"), (out, "out")):
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(FULL)
    body = ir.Graph(body_in, [again.outputs[0], out.outputs[0]], nodes=[inner, again, out], name="body")
    made = sketch.node("Scan", [start, wide], {"body": body, "num_scan_inputs": 1}, shapes=[[64], ["rows", 64]], name="loop")
    sketch.output("present_state.0", made[0])
    sketch.output("y", made[1])
    model = sketch.model()
    given = {"x": X[0], "state.0": X[0, 0]}
    wanted = run(model, given)
    changes = StrongTypes().apply(model)
    assert changes.notes == ["loop: Scan stays fp32, what it repeats included"]
    assert dtypes(model)["product"] == HALF and {value.dtype for value in model.graph.outputs} == {HALF}
    found = run(half_twin(model), given)
    assert all(largest_difference(found[name], wanted[name]) <= 1e-2 * np.abs(wanted[name]).max() for name in wanted)


def test_an_untyped_graph_has_no_twin():
    with pytest.raises(ValueError, match="not strongly typed"):
        half_twin(block())
