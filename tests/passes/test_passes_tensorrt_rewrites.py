"""Operators written out for TensorRT's parser, against ONNX Runtime's own kernels of them."""

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import Sketch, largest_difference, ops, run

from vlm_edge.passes.tensorrt.decompose_attention import DecomposeAttention
from vlm_edge.passes.tensorrt.decompose_norms import DecomposeGroupNormalization, DecomposeRMSNormalization
from vlm_edge.passes.tensorrt.decompose_rotary import DecomposeRotary
from vlm_edge.passes.tensorrt.dense_selection import DenseSelection
from vlm_edge.passes.tensorrt.lower_opset import LowerOpset
from vlm_edge.passes.tensorrt.narrow_integers import NarrowIntegers
from vlm_edge.passes.tensorrt.native_attention import DECOMPOSABLE, NativeAttention
from vlm_edge.passes.tensorrt.positive_indices import PositiveIndices
from vlm_edge.passes.tensorrt.single_step import SingleStep
from vlm_edge.passes.tensorrt.unused_inputs import DropUnusedInputs
from vlm_edge_runtime.errors import TargetError

TOLERANCE = 1e-5
RANDOM = np.random.default_rng(5)


def real(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def rewritten(make, feeds, *passes, tolerance=TOLERANCE):
    """The model after its passes; what it gives must be what it gave before."""
    model = make()
    for one in passes:
        assert one.apply(model), one.name
    wanted, found = run(make(), feeds), run(model, feeds)
    for name, value in wanted.items():
        assert largest_difference(found[name], value) <= tolerance, name
    return model


def attention(heads=4, kv_heads=2, *, mask=None, flat=False, **attributes):
    """`mask`: None, bool or float, [2, 1, 5, 7]."""

    def make():
        sketch = Sketch()
        names = (("query", heads, "sequence"), ("key", kv_heads, "source"), ("value", kv_heads, "source"))
        parts = [
            sketch.input(name, ["batch", n, length, 16] if not flat else ["batch", length, n * 16]) for name, n, length in names
        ]
        if mask is not None:
            dtype = ir.DataType.BOOL if mask is bool else ir.DataType.FLOAT
            parts.append(sketch.input("mask", ["batch", 1, "sequence", "source"], dtype))
        shape = ["batch", heads, "sequence", 16] if not flat else ["batch", "sequence", heads * 16]
        more = {"q_num_heads": heads, "kv_num_heads": kv_heads} if flat else {}
        sketch.output("out", sketch.node("Attention", parts, attributes | more, shape=shape, name="attention"))
        return sketch.model()

    feeds = {}
    for name, count, length in (("query", heads, 5), ("key", kv_heads, 7), ("value", kv_heads, 7)):
        feeds[name] = real(2, count, length, 16) if not flat else real(2, length, count * 16)
    seen = RANDOM.random((2, 1, 5, 7)) < 0.7
    seen[..., 0] = True
    feeds["mask"] = seen if mask is bool else np.where(seen, real(2, 1, 5, 7), np.float32(-1e9))
    return make, feeds


@pytest.mark.parametrize("mask", [None, bool, float], ids=["unmasked", "bool", "additive"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("flat", [False, True], ids=["4d", "3d"])
def test_attention(mask, kv_heads, flat):
    make, feeds = attention(kv_heads=kv_heads, mask=mask, flat=flat, scale=0.3)
    model = rewritten(make, feeds, DecomposeAttention())
    assert "Attention" not in ops(model) and "Softmax" in ops(model)


@pytest.mark.parametrize("mask", [None, bool, float], ids=["unmasked", "bool", "additive"])
def test_soft_capped_attention_is_written_out_and_no_other(mask):
    make, feeds = attention(mask=mask, softcap=0.5)
    feeds["query"] *= 4
    rewritten(make, feeds, DecomposeAttention(softcap_only=True))
    plain = attention(mask=mask)[0]()
    assert not DecomposeAttention(softcap_only=True).apply(plain)


def test_causal_attention_of_an_encoder():
    make, feeds = attention(is_causal=1)
    feeds["key"], feeds["value"] = feeds["key"][:, :, :5], feeds["value"][:, :, :5]
    rewritten(make, feeds, DecomposeAttention())


def test_a_row_that_sees_nothing_is_finite():
    make, feeds = attention(mask=bool)
    feeds["mask"][:, :, 2] = False
    model = make()
    DecomposeAttention().apply(model)
    assert np.isfinite(run(model, feeds)["out"]).all()


def test_native_attention_is_marked_and_refuses_what_the_parser_refuses():
    model = attention(mask=bool)[0]()
    assert NativeAttention().apply(model) and not NativeAttention().apply(model)
    node = next(node for node in model.graph if node.op_type == "Attention")
    assert node.metadata_props[DECOMPOSABLE] == "1" and "TRT_decomposable" not in node.attributes
    with pytest.raises(TargetError, match="'attention' has a past or a soft-cap"):
        NativeAttention().apply(attention(softcap=2.0)[0]())


@pytest.mark.parametrize(("axis", "weight"), [(-1, (12,)), (1, (3, 12))], ids=["last", "two axes"])
def test_rms_normalisation(axis, weight):
    scale = real(*weight)

    def make():
        sketch = Sketch()
        source = sketch.input("x", ["batch", 3, 12])
        attributes = {"axis": axis, "epsilon": 1e-3}
        sketch.output(
            "out", sketch.node("RMSNormalization", [source, sketch.weight("w", scale)], attributes, shape=["batch", 3, 12])
        )
        return sketch.model()

    model = rewritten(make, {"x": real(2, 3, 12)}, DecomposeRMSNormalization())
    marked = [node.op_type for node in model.graph if node.metadata_props.get("vlm_edge.precision") == "fp32"]
    assert marked == ["Mul", "ReduceMean", "Add", "Sqrt", "Div"]


def test_group_normalisation():
    weight, bias = real(6), real(6)

    def make():
        sketch = Sketch()
        parts = [sketch.input("x", ["batch", 6, "height", 5]), sketch.weight("w", weight), sketch.weight("b", bias)]
        out = sketch.node("GroupNormalization", parts, {"num_groups": 3, "epsilon": 1e-3}, shape=["batch", 6, "height", 5])
        sketch.output("out", out)
        return sketch.model()

    rewritten(make, {"x": real(2, 6, 4, 5) * 3 + 1}, DecomposeGroupNormalization(), LowerOpset(20))


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("part", [0, 8], ids=["whole head", "part of a head"])
@pytest.mark.parametrize("form", ["4d", "3d", "positions"])
def test_rotation(interleaved, part, form):
    half = (part or 16) // 2
    tables = [real(20, half), real(20, half)]

    def make():
        sketch = Sketch()
        source = sketch.input("x", ["batch", 4, "sequence", 16] if form != "3d" else ["batch", "sequence", 64])
        attributes = {"interleaved": interleaved, "num_heads": 4} | ({"rotary_embedding_dim": part} if part else {})
        if form == "positions":
            inputs = [sketch.weight("cos", tables[0]), sketch.weight("sin", tables[1])]
            inputs.append(sketch.input("positions", ["batch", "sequence"], ir.DataType.INT64))
        else:
            inputs = [sketch.input(name, ["batch", "sequence", half]) for name in ("cos", "sin")]
        shape = source.shape
        sketch.output("out", sketch.node("RotaryEmbedding", [source, *inputs], attributes, shape=shape))
        return sketch.model()

    source = real(2, 4, 3, 16)
    feeds = {"x": source if form != "3d" else np.ascontiguousarray(source.transpose(0, 2, 1, 3)).reshape(2, 3, 64)}
    positions = np.array([[0, 1, 2], [7, 8, 19]], np.int64)
    feeds |= {"positions": positions, "cos": tables[0][positions], "sin": tables[1][positions]}
    rewritten(make, feeds, DecomposeRotary(), LowerOpset(20))


@pytest.mark.parametrize("indices", [np.array(-1), np.array([-1]), np.array([-2])], ids=["last", "last row", "last but one"])
@pytest.mark.parametrize("size", ["sequence", 6])
def test_indices_from_the_end(indices, size):
    def make():
        sketch = Sketch()
        source = sketch.input("x", ["batch", size, 4])
        shape = ["batch", 4] if indices.ndim == 0 else ["batch", 1, 4]
        sketch.output("out", sketch.node("Gather", [source, sketch.weight("at", indices)], {"axis": 1}, shape=shape))
        return sketch.model()

    model = rewritten(make, {"x": real(2, 6, 4)}, PositiveIndices())
    assert ("Slice" in ops(model)) == (size == "sequence")


def embedding():
    """Ids from 30 on stand in a second table (as the exporter writes IDEFICS' embedding)."""
    first, second = real(30, 8), real(4, 8)

    def make():
        sketch = Sketch()
        i64, pair = ir.DataType.INT64, ["found", 2]
        ids = sketch.input("ids", ["batch", "sequence"], i64)
        added = sketch.node(
            "GreaterOrEqual", [ids, sketch.weight("n", np.array(30))], shape=["batch", "sequence"], dtype=ir.DataType.BOOL
        )
        places = sketch.node("NonZero", [added], shape=[2, "found"], dtype=i64)
        places = sketch.node("Transpose", [places], {"perm": [1, 0]}, shape=pair, dtype=i64)
        columns = []
        for number in range(2):
            bounds = [sketch.weight(f"{number}.{i}", np.array([n])) for i, n in enumerate((number, number + 1, 1))]
            cut = sketch.node("Slice", [places, *bounds], shape=["found", 1], dtype=i64)
            flat = sketch.node("Squeeze", [cut, bounds[2]], shape=["found"], dtype=i64)
            columns.append(sketch.node("Unsqueeze", [flat, sketch.weight(f"u{number}", np.array([-1]))], shape=pair, dtype=i64))
        where = sketch.node("Concat", columns, {"axis": -1}, shape=pair, dtype=i64)
        found = sketch.node("GatherND", [ids, where], shape=["found"], dtype=i64)
        found = sketch.node("Sub", [found, sketch.weight("m", np.array(30))], shape=["found"], dtype=i64)
        rows = sketch.node("Gather", [sketch.weight("second", second), found], {"axis": 0}, shape=["found", 8])
        count = sketch.node("Shape", [found], shape=[1], dtype=i64)
        zeros = sketch.node("Expand", [sketch.weight("z", np.array([0])), count], shape=["found"], dtype=i64)
        safe = sketch.node("ScatterND", [ids, where, zeros], shape=["batch", "sequence"], dtype=i64)
        base = sketch.node("Gather", [sketch.weight("first", first), safe], {"axis": 0}, shape=["batch", "sequence", 8])
        sketch.output("out", sketch.node("ScatterND", [base, where, rows], shape=["batch", "sequence", 8]))
        return sketch.model()

    return make


def test_rows_chosen_by_content():
    ids = np.array([[3, 31, 29, 33], [30, 0, 1, 2]], np.int64)
    model = rewritten(embedding(), {"ids": ids}, DenseSelection(), tolerance=0)
    assert not {"NonZero", "ScatterND", "GatherND"} & set(ops(model))


def test_another_use_of_chosen_rows_is_refused():
    sketch = Sketch()
    source = sketch.input("x", ["n"], ir.DataType.BOOL)
    sketch.output("where", sketch.node("NonZero", [source], shape=[1, "found"], dtype=ir.DataType.INT64, name="places"))
    with pytest.raises(TargetError, match="NonZero 'places' chooses rows by their content"):
        DenseSelection().apply(sketch.model())


def test_int64_inputs_and_outputs_become_int32():
    table = real(9, 4)

    def make():
        sketch = Sketch()
        ids = sketch.input("ids", ["batch", "sequence"], ir.DataType.INT64)
        sketch.output("rows", sketch.node("Gather", [sketch.weight("table", table), ids], shape=["batch", "sequence", 4]))
        twice = sketch.node("Add", [ids, ids], shape=["batch", "sequence"], dtype=ir.DataType.INT64)
        sketch.output("twice", twice)
        sketch.output("same", sketch.node("Cast", [twice], {"to": 1}, shape=["batch", "sequence"]))
        return sketch.model()

    model = make()
    assert NarrowIntegers().apply(model).counts == {"inputs": 1, "outputs": 1}
    assert ops(model).count("Cast") == 3  # to int64 for the sum, to int32 for the output, and the model's own
    ids = np.array([[1, 8, 3]], np.int64)
    wanted, found = run(make(), {"ids": ids}), run(model, {"ids": ids.astype(np.int32)})
    assert found["twice"].dtype == np.int32
    assert all(np.array_equal(wanted[name], found[name]) for name in wanted)
    assert not NarrowIntegers().apply(model)


def recurrent(direction: int = 0) -> ir.Model:
    """state' = tanh(state · w + x) over the tokens, every state given out as well."""
    sketch, weight = Sketch(), np.array([0.3, -0.7, 1.1, 0.2], np.float32)
    state, tokens = sketch.input("state.0", ["batch", 4]), sketch.input("x", ["batch", "sequence", 4])
    turned = sketch.node("Transpose", [tokens], {"perm": [1, 0, 2]}, shape=["sequence", "batch", 4])
    inner = Sketch()
    before, token = inner.input("before", ["batch", 4]), inner.input("token", ["batch", 4])
    scaled = inner.node("Mul", [before, inner.weight("w", weight)], shape=["batch", 4])
    summed = inner.node("Add", [scaled, token], shape=["batch", 4])
    after = inner.node("Tanh", [summed], shape=["batch", 4])
    scaled.name, summed.name = "scaled", "summed"
    inner.output("after", after)
    inner.output("seen", inner.node("Identity", [after], shape=["batch", 4]))
    body = inner.model().graph
    attributes = {"body": body, "num_scan_inputs": 1, "scan_input_directions": [direction]}
    last, seen = sketch.node("Scan", [state, turned], attributes, shapes=[["batch", 4], ["sequence", "batch", 4]], name="loop")
    sketch.output("present_state.0", last)
    sketch.output("out", sketch.node("Transpose", [seen], {"perm": [1, 0, 2]}, shape=["batch", "sequence", 4]))
    return sketch.model()


def test_a_loop_over_tokens_becomes_one_step():
    model, state, tokens = recurrent(), real(2, 4), real(2, 3, 4)
    assert SingleStep().apply(model) and not SingleStep().apply(model)
    assert "Scan" not in ops(model)
    assert [str(value.shape) for value in model.graph.inputs] == ["[batch,4]", "[batch,1,4]"]
    wanted = run(recurrent(), {"state.0": state, "x": tokens})
    for token in range(3):
        found = run(model, {"state.0": state, "x": tokens[:, token : token + 1]})
        state = found["present_state.0"]
        assert largest_difference(found["out"][:, 0], wanted["out"][:, token]) <= TOLERANCE
    assert largest_difference(state, wanted["present_state.0"]) <= TOLERANCE


def test_a_loop_that_runs_backwards_is_refused():
    with pytest.raises(TargetError, match="Scan 'loop' has scan_input_directions"):
        SingleStep().apply(recurrent(1))


def test_an_input_that_nothing_reads_goes_and_is_named():
    sketch = Sketch()
    source = sketch.input("x", ["n"])
    sketch.input("position_ids", ["n"])
    sketch.output("out", sketch.node("Relu", [source], shape=["n"]))
    model = sketch.model()
    assert DropUnusedInputs().apply(model).notes == ["nothing reads 'position_ids'"]
    assert [value.name for value in model.graph.inputs] == ["x"]


def test_an_operator_that_the_opset_lacks_is_named():
    with pytest.raises(TargetError, match=r"Attention 'attention' does not exist in opset 20"):
        LowerOpset(20).apply(attention()[0]())


def test_an_operator_that_meant_something_else_is_named():
    sketch = Sketch()
    parts = [sketch.input("x", ["batch", 6, 4]), sketch.weight("w", real(6)), sketch.weight("b", real(6))]
    sketch.output("out", sketch.node("GroupNormalization", parts, {"num_groups": 3}, shape=["batch", 6, 4], name="norm"))
    with pytest.raises(TargetError, match="'norm' means something else in opset 20 than in 23"):
        LowerOpset(20).apply(sketch.model())


def test_attributes_that_say_nothing_are_left_out():
    sketch = Sketch()
    parts = [sketch.input("x", [4, 2]), sketch.weight("at", np.array([[1]])), sketch.weight("rows", real(1, 2))]
    sketch.output("out", sketch.node("ScatterND", parts, {"reduction": "none"}, shape=[4, 2]))
    model = sketch.model()
    LowerOpset(20).apply(model)
    assert not next(node for node in model.graph).attributes
