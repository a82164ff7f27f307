"""Rotation, packed projections, skip norms and last-token logits: each on a lowered decoder, against the portable one."""

import numpy as np
import onnx_ir as ir
import pytest
from small_decoder import STEPS, Shape, decoder, feeds
from small_graphs import Sketch, largest_difference, ops, run

from vlm_edge.passes.base import run_passes
from vlm_edge.passes.cleanup import Cleanup
from vlm_edge.passes.flatten import Unflatten
from vlm_edge.passes.fuse_rotary import FuseRotaryEmbedding
from vlm_edge.passes.fuse_skip_norm import FuseSkipNorm
from vlm_edge.passes.gemm import GemmToMatMul
from vlm_edge.passes.group_query_attention import LowerToGroupQueryAttention
from vlm_edge.passes.last_token import LastTokenLogits
from vlm_edge.passes.layout import CancelLayout
from vlm_edge.passes.pack_qkv import PackQKV
from vlm_edge.passes.recompose_rotary import RecomposeRotary
from vlm_edge.quantize.weight_only import logits_products

TOLERANCE = 1e-4
CONTEXT = 96


def lowered(shape, *steps):
    model = decoder(shape)
    run_passes(model, [Cleanup(), LowerToGroupQueryAttention()])
    changes = run_passes(model, steps)
    assert not any(run_passes(model, steps)), "a second run finds nothing to do"
    return model, changes


def assert_same(shape, model, offset=0):
    portable = decoder(shape)
    for batch, sequence, past in STEPS:
        old, new = feeds(shape, batch=batch, sequence=sequence, past=past, offset=offset)
        wanted, found = run(portable, old), run(model, new)
        for name, value in wanted.items():
            got = found[name] if name == "logits" else found[name][:, :, : past + sequence]
            value = value[:, -got.shape[1] :] if name == "logits" else value
            assert largest_difference(got, value) <= TOLERANCE, (name, batch, sequence, past)


@pytest.mark.parametrize("rotary", ["full", "interleaved"])
@pytest.mark.parametrize("size", [16, 32, 64, 80])
@pytest.mark.parametrize("offset", [0, 40], ids=["at-slot", "offset"])
def test_rotation_is_fused(rotary, size, offset):
    """Positions are those given, also when they differ from the cache's slots."""
    shape = Shape(rotary=rotary, size=size)
    model, changes = lowered(shape, FuseRotaryEmbedding(CONTEXT))
    assert changes[0].counts["rotations fused"] == 4
    assert not {"RotaryEmbedding", "Cos", "Sin"} & set(ops(model))
    assert list(model.graph.initializers["rotary.cos"].shape) == [CONTEXT, size // 2]
    assert "rotary.cos.1" not in model.graph.initializers, "layers share their tables"
    assert_same(shape, model, offset)


@pytest.mark.parametrize("shape", [Shape(size=8), Shape(rotary="mrope")], ids=["size-8", "mrope"])
def test_rotation_that_cannot_be_fused_stays_without_transposes(shape):
    model, changes = lowered(shape, FuseRotaryEmbedding(CONTEXT))
    assert changes[0].notes and "stays outside" in changes[0].notes[0]
    assert ops(model).count("RotaryEmbedding") == 4 and "Transpose" not in ops(model)
    assert_same(shape, model)


@pytest.mark.parametrize("bias", [False, True])
def test_projections_are_packed(bias):
    shape = Shape(bias=bias)
    model, changes = lowered(shape, FuseRotaryEmbedding(CONTEXT), PackQKV())
    assert changes[1].counts["projections packed"] == 6
    packed = model.graph.initializers["layers.0.qkv_proj.weight"]
    assert list(packed.shape) == [48, (4 + 2 + 2) * 16]
    assert isinstance(packed.const_value, ir.LazyTensor), "the concatenation is made when saved"
    assert_same(shape, model)


def test_projections_behind_an_unfused_rotation_stay_apart():
    model, changes = lowered(Shape(size=8), FuseRotaryEmbedding(CONTEXT), PackQKV())
    assert not changes[1]
    assert_same(Shape(size=8), model)


@pytest.mark.parametrize("norm", ["RMSNormalization", "LayerNormalization"])
@pytest.mark.parametrize("bias", [False, True])
def test_skip_norms(norm, bias):
    shape = Shape(norm=norm, bias=bias)
    model, changes = lowered(shape, FuseSkipNorm())
    assert changes[0].counts[f"Add + {norm}"] == 4
    assert changes[0].counts["biases taken in"] == (4 if bias else 0)
    assert ops(model).count(norm) == 1, "only the first has no addition before it"
    assert_same(shape, model)


def test_skip_norm_leaves_broadcast_additions_alone():
    sketch = Sketch()
    x, y = sketch.input("x", ["b", "s", 8]), sketch.input("y", ["b", 1, 8])
    added = sketch.node("Add", [x, y], shape=["b", "s", 8])
    scale = sketch.weight("scale", np.ones(8, np.float32))
    sketch.output("out", sketch.node("RMSNormalization", [added, scale], {"axis": -1}, shape=["b", "s", 8]))
    assert not FuseSkipNorm().apply(sketch.model())


@pytest.mark.parametrize(
    "shape", [Shape(), Shape(rotary="none", norm="LayerNormalization", bias=True, gemm=True)], ids=["llama", "opt"]
)
def test_last_token(shape):
    steps = [GemmToMatMul(), Unflatten(), CancelLayout(), LastTokenLogits()]
    model, changes = lowered(shape, *steps)
    logits = model.graph.outputs[0]
    assert [str(d) for d in logits.shape] == ["batch", "1", "50"]
    assert changes[3].counts["rows picked"] == 2, "the attention's result and the residual stream"
    assert changes[3].counts["nodes on the last row only"] >= 8, "the last feed-forward block too"
    assert_same(shape, model)


def test_last_token_before_a_head_whose_words_are_masked_and_scaled():
    """Chameleon hides its image tokens, Cohere scales its logits: still one row of the vocabulary, not the prompt's."""
    random = np.random.default_rng(0)
    sketch = Sketch()
    x = sketch.input("x", ["b", "s", 8])
    matrix = sketch.weight("head", random.standard_normal((8, 6)).astype(np.float32))
    logits = sketch.node("MatMul", [x, matrix], shape=["b", "s", 6])
    scaled = sketch.node("Mul", [logits, sketch.weight("scale", np.float32(0.0625))], shape=["b", "s", 6])
    hidden = [sketch.weight("hidden", np.array([0, 1, 0, 0, 1, 0], np.bool_)), sketch.weight("least", np.float32(-1e30))]
    sketch.output("logits", sketch.node("Where", [*hidden, scaled], shape=["b", "s", 6]))
    model, feed = sketch.model(), {"x": random.standard_normal((2, 5, 8)).astype(np.float32)}
    wanted = run(model, feed)["logits"]
    assert [node.op_type for node in logits_products(model.graph)] == ["MatMul"]
    assert LastTokenLogits().apply(model).counts["nodes on the last row only"] == 3
    assert largest_difference(run(model, feed)["logits"], wanted[:, -1:]) < 1e-6


def test_last_token_when_the_head_is_not_rowwise():
    sketch = Sketch()
    x = sketch.input("x", ["b", "s", 8])
    sketch.output("logits", sketch.node("Softmax", [x], {"axis": 1}, shape=["b", "s", 8]))
    model = sketch.model()
    assert LastTokenLogits().apply(model).counts["rows picked after the head"] == 1
    values = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    wanted = np.exp(values) / np.exp(values).sum(1, keepdims=True)
    assert largest_difference(run(model, {"x": values})["logits"], wanted[:, -1:]) < 1e-6


def test_all_together_is_short_and_right():
    shape = Shape(window=4, bias=True)
    steps = [
        *(GemmToMatMul(), Unflatten(), CancelLayout(), FuseRotaryEmbedding(CONTEXT), PackQKV(), LastTokenLogits()),
        *(FuseSkipNorm(), Cleanup()),
    ]
    model, _ = lowered(shape, *steps)
    assert not {"Reshape", "Transpose", "RotaryEmbedding", "Shape", "Where"} & set(ops(model))
    assert_same(shape, model)


def test_packed_projection_is_passed_on_unsplit():
    """GPT-2 and Phi-3 split one projection into query, key and value."""
    random = np.random.default_rng(0)
    sketch = Sketch()
    x = sketch.input("x", ["b", "s", 24])
    lengths, total = sketch.input("seqlens_k", ["b"], ir.DataType.INT32), sketch.input("total", [1], ir.DataType.INT32)
    past = [sketch.input(name, ["b", 2, "c", 8]) for name in ("past_key_values.0.key", "past_key_values.0.value")]
    product = sketch.node(
        "MatMul", [x, sketch.weight("w", random.standard_normal((24, 48)).astype(np.float32))], shape=["b", "s", 48]
    )
    sizes = sketch.weight("sizes", np.array([16, 16, 16]))
    parts = sketch.node("Split", [product, sizes], {"axis": 2}, shapes=[["b", "s", 16]] * 3)
    outs = sketch.node(
        "GroupQueryAttention", [*parts, *past, lengths, total], {"num_heads": 2, "kv_num_heads": 2, "scale": 0.3},
        shapes=[["b", "s", 16], None, None], domain="com.microsoft",
    )  # fmt: skip
    sketch.output("y", outs[0])
    model = sketch.model()
    feed = {
        "x": random.standard_normal((1, 4, 24)).astype(np.float32), "seqlens_k": np.array([3], np.int32),
        "total": np.array([4], np.int32), **{v.name: np.zeros((1, 2, 8, 8), np.float32) for v in past},
    }  # fmt: skip
    before = run(model, feed)["y"]
    assert PackQKV().apply(model).counts["splits removed"] == 1
    assert ops(model) == ["MatMul", "GroupQueryAttention"]
    assert largest_difference(run(model, feed)["y"], before) <= 1e-6


def test_query_scale_goes_into_the_attention():
    """OPT multiplies its queries by a constant."""
    random = np.random.default_rng(1)
    sketch = Sketch()
    x = sketch.input("x", ["b", "s", 16])
    lengths, total = sketch.input("seqlens_k", ["b"], ir.DataType.INT32), sketch.input("total", [1], ir.DataType.INT32)
    past = [sketch.input(name, ["b", 2, "c", 8]) for name in ("past_key_values.0.key", "past_key_values.0.value")]
    dims = ["b", "s", 16]
    parts = [
        sketch.node("MatMul", [x, sketch.weight(f"{n}_proj", random.standard_normal((16, 16)).astype(np.float32))], shape=dims)
        for n in "qkv"
    ]
    parts[0] = sketch.node("Mul", [parts[0], sketch.weight("factor", np.float32(0.25))], shape=dims)
    outs = sketch.node(
        "GroupQueryAttention", [*parts, *past, lengths, total], {"num_heads": 2, "kv_num_heads": 2, "scale": 1.0},
        shapes=[dims, None, None], domain="com.microsoft",
    )  # fmt: skip
    sketch.output("y", outs[0])
    model = sketch.model()
    feed = {
        "x": random.standard_normal((1, 4, 16)).astype(np.float32), "seqlens_k": np.array([3], np.int32),
        "total": np.array([4], np.int32), **{v.name: np.zeros((1, 2, 8, 8), np.float32) for v in past},
    }  # fmt: skip
    before = run(model, feed)["y"]
    counts = PackQKV().apply(model).counts
    assert counts["query scales folded"] == 1 and counts["projections packed"] == 3
    assert largest_difference(run(model, feed)["y"], before) <= 1e-5


@pytest.mark.parametrize("swapped", [False, True])
def test_written_out_rotation_is_recomposed(swapped):
    """Qwen2-VL's M-RoPE as the tracer leaves it: x·cos + rotate_half(x)·sin."""
    sketch = Sketch()
    dims = ["batch", 2, "sequence", 8]
    x, c, s = sketch.input("x", dims), *(sketch.input(n, ["batch", "sequence", 4]) for n in "cs")
    tables = []
    for half in (c, s):
        whole = sketch.node("Concat", [half, half], {"axis": -1}, shape=["batch", "sequence", 8])
        axis = sketch.weight(f"axis.{half.name}", np.array([1]))
        tables.append(sketch.node("Unsqueeze", [whole, axis], shape=["batch", 1, "sequence", 8]))
    bounds = {
        name: sketch.weight(name, np.array([value])) for name, value in (("zero", 0), ("four", 4), ("end", 2**62), ("last", 3))
    }
    low = sketch.node("Slice", [x, bounds["zero"], bounds["four"], bounds["last"]], shape=["batch", 2, "sequence", 4])
    high = sketch.node("Slice", [x, bounds["four"], bounds["end"], bounds["last"]], shape=["batch", 2, "sequence", 4])
    turned = sketch.node("Concat", [sketch.node("Neg", [high], shape=["batch", 2, "sequence", 4]), low], {"axis": -1}, shape=dims)
    plain = sketch.node("Mul", [x, tables[0]], shape=dims)
    other = sketch.node("Mul", [tables[1], turned] if swapped else [turned, tables[1]], shape=dims)
    sketch.output("y", sketch.node("Add", [other, plain] if swapped else [plain, other], shape=dims))
    model = sketch.model()
    random = np.random.default_rng(0)
    feed = {
        "x": random.standard_normal((2, 2, 5, 8)),
        "c": random.standard_normal((2, 5, 4)),
        "s": random.standard_normal((2, 5, 4)),
    }
    feed = {name: value.astype(np.float32) for name, value in feed.items()}
    before = run(model, feed)["y"]
    assert RecomposeRotary().apply(model).counts["rotations"] == 1
    assert ops(model) == ["RotaryEmbedding"]
    assert largest_difference(run(model, feed)["y"], before) <= 1e-6


def test_a_rotation_the_other_way_is_not_taken_for_one():
    """rotate_half with the sign on the wrong half is something else."""
    sketch = Sketch()
    dims = ["batch", 2, "sequence", 8]
    x, c = sketch.input("x", dims), sketch.input("c", ["batch", "sequence", 4])
    whole = sketch.node("Concat", [c, c], {"axis": -1}, shape=["batch", "sequence", 8])
    table = sketch.node("Unsqueeze", [whole, sketch.weight("axis", np.array([1]))], shape=["batch", 1, "sequence", 8])
    zero, four, end, last = (sketch.weight(f"n{v}", np.array([v])) for v in (0, 4, 8, 3))
    low = sketch.node("Slice", [x, zero, four, last], shape=["batch", 2, "sequence", 4])
    high = sketch.node("Slice", [x, four, end, last], shape=["batch", 2, "sequence", 4])
    turned = sketch.node("Concat", [sketch.node("Neg", [low], shape=["batch", 2, "sequence", 4]), high], {"axis": -1}, shape=dims)
    products = [sketch.node("Mul", [value, table], shape=dims) for value in (x, turned)]
    sketch.output("y", sketch.node("Add", products, shape=dims))
    assert not RecomposeRotary().apply(sketch.model())


def test_projection_cut_by_slices_is_passed_on_whole():
    """Phi-3 slices one projection; cuts in another order stay."""
    for order, packed in (((0, 16, 32), True), ((16, 0, 32), False)):
        random = np.random.default_rng(0)
        sketch = Sketch()
        x = sketch.input("x", ["b", "s", 48])
        lengths, total = sketch.input("seqlens_k", ["b"], ir.DataType.INT32), sketch.input("total", [1], ir.DataType.INT32)
        past = [sketch.input(name, ["b", 2, "c", 8]) for name in ("past_key_values.0.key", "past_key_values.0.value")]
        bound = {v: sketch.weight(f"n{v}", np.array([v])) for v in (0, 16, 32, 48, 2)}
        whole = sketch.node("Relu", [x], shape=["b", "s", 48])
        parts = [sketch.node("Slice", [whole, bound[at], bound[at + 16], bound[2]], shape=["b", "s", 16]) for at in order]
        outs = sketch.node(
            "GroupQueryAttention", [*parts, *past, lengths, total], {"num_heads": 2, "kv_num_heads": 2, "scale": 0.3},
            shapes=[["b", "s", 16], None, None], domain="com.microsoft",
        )  # fmt: skip
        sketch.output("y", outs[0])
        model = sketch.model()
        feed = {
            "x": random.standard_normal((1, 4, 48)).astype(np.float32), "seqlens_k": np.array([3], np.int32),
            "total": np.array([4], np.int32), **{v.name: np.zeros((1, 2, 8, 8), np.float32) for v in past},
        }  # fmt: skip
        before = run(model, feed)["y"]
        assert bool(PackQKV().apply(model)) == packed
        assert ops(model) == (
            ["Relu", "GroupQueryAttention"] if packed else ["Relu", "Slice", "Slice", "Slice", "GroupQueryAttention"]
        )
        assert largest_difference(run(model, feed)["y"], before) <= 1e-6
