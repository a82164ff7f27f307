"""MatMulNBits as ONNX Runtime computes it, and embedding tables."""

import numpy as np
import onnx_ir as ir
import pytest
from small_decoder import Shape, decoder
from small_graphs import Sketch, largest_difference, ops, run

from vlm_edge.passes.cleanup import Cleanup
from vlm_edge.passes.gemm import GemmToMatMul
from vlm_edge.quantize.blockwise import BlockFormat, choose_scales, dequantize, quantize
from vlm_edge.quantize.embedding import EmbeddingStorage
from vlm_edge.quantize.weight_only import WeightOnlyMatMul, logits_products
from vlm_edge_runtime.bundle.reader import open_bundle

RANDOM = np.random.default_rng(0)


def linear(weight, bias=None):
    sketch = Sketch()
    depth, width = weight.shape
    out = sketch.node("MatMul", [sketch.input("x", ["b", "s", depth]), sketch.weight("w", weight)], shape=["b", "s", width])
    if bias is not None:
        out = sketch.node("Add", [out, sketch.weight("bias", bias)], shape=["b", "s", width])
    sketch.output("y", out)
    return sketch.model()


def stored_weight(weight, form):
    """What the codes stand for, [K, N]."""
    scales, zeros = choose_scales(weight.T, form)
    return dequantize(quantize(weight.T, scales, zeros, form), scales, zeros, form, weight.shape[0]).T


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("depth,width", [(128, 48), (100, 33)], ids=["whole blocks", "padded"])
def test_kernel_reads_our_layout(bits, block_size, symmetric, depth, width):
    """With fp32 activations the kernel's result is that of the dequantised weight, to rounding."""
    weight = RANDOM.standard_normal((depth, width)).astype(np.float32)
    bias = RANDOM.standard_normal(width).astype(np.float32)
    form = BlockFormat(bits, block_size, symmetric)
    model = linear(weight, bias)
    changes = WeightOnlyMatMul(form, accuracy_level=1).apply(model)
    assert ops(model) == ["MatMulNBits"] and changes.counts[f"int{bits} block {block_size}"] == 1
    assert bool(changes.notes) == bool(depth % block_size), "padding is reported"
    assert "w" not in model.graph.initializers
    for rows in (1, 5):
        x = RANDOM.standard_normal((2, rows, depth)).astype(np.float32)
        wanted = x @ stored_weight(weight, form) + bias
        assert largest_difference(run(model, {"x": x})["y"], wanted) <= 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_int8_activations_stay_within_their_rounding(bits):
    """accuracy_level 4 rounds x to 8 bits per block: |error| ≤ Σ |w| · max|x in block| / 127 / 2 (one step of slack)."""
    weight = RANDOM.standard_normal((128, 40)).astype(np.float32)
    form = BlockFormat(bits, 32)
    model = linear(weight)
    WeightOnlyMatMul(form, accuracy_level=4).apply(model)
    x = RANDOM.standard_normal((1, 7, 128)).astype(np.float32)
    real = stored_weight(weight, form)
    step = np.repeat(np.abs(x.reshape(7, 4, 32)).max(-1), 32, axis=-1) / 127
    bound = (step @ np.abs(real))[None]
    found = run(model, {"x": x})["y"]
    assert np.isfinite(found).all() and (np.abs(found - x @ real) <= bound).all()


def test_codes_are_computed_when_saved(tmp_path):
    model = linear(RANDOM.standard_normal((64, 64)).astype(np.float32))
    WeightOnlyMatMul(BlockFormat()).apply(model)
    assert isinstance(model.graph.initializers["w.int4"].const_value, ir.LazyTensor)
    ir.save(model, tmp_path / "m.onnx", external_data="m.onnx.data")
    assert (tmp_path / "m.onnx.data").stat().st_size == 64 * 64 // 2 + 64 * 2 * 4


def test_head_has_a_format_of_its_own():
    model = decoder(Shape())
    assert [node.name for node in logits_products(model.graph)] == ["lm_head"]
    changes = WeightOnlyMatMul(BlockFormat(4, 16), head=BlockFormat(8, 16)).apply(model)
    assert changes.counts["int8 block 16 head"] == 1 and changes.counts["int4 block 16"] == 14
    model = decoder(Shape())
    WeightOnlyMatMul(BlockFormat(4, 16), keep_head=True).apply(model)
    assert ops(model).count("MatMul") == 1
    model = decoder(Shape())
    WeightOnlyMatMul(None, head=BlockFormat(8, 16)).apply(model)
    assert ops(model).count("MatMulNBits") == 1


def test_a_head_of_two_matrices_is_one(portable_bundle):
    """IDEFICS: the logits of added tokens are appended."""
    model = ir.load(open_bundle(portable_bundle("idefics")).graph_path("decoder"))
    heads = logits_products(model.graph)
    assert sorted(node.inputs[1].shape[1] for node in heads) == [2, 382]
    changes = WeightOnlyMatMul(BlockFormat(4, 32), head=BlockFormat(8, 32)).apply(model)
    assert changes.counts["int8 block 32 head"] == 2


def test_gemm_layers_are_reached():
    model = decoder(Shape(gemm=True, norm="LayerNormalization", rotary="none", bias=True))
    GemmToMatMul().apply(model)
    WeightOnlyMatMul(BlockFormat(4, 16)).apply(model)
    Cleanup().apply(model)
    assert not {"Gemm", "MatMul"} & set(ops(model))
    assert ops(model).count("MatMulNBits") == 6 * 2 + 1


def test_shared_weight_is_stored_once():
    weight = RANDOM.standard_normal((32, 32)).astype(np.float32)
    sketch = Sketch()
    stored = sketch.weight("w", weight)
    once = sketch.node("MatMul", [sketch.input("x", ["b", "s", 32]), stored], shape=["b", "s", 32])
    sketch.output("y", sketch.node("MatMul", [once, stored], shape=["b", "s", 32]))
    model = sketch.model()
    assert WeightOnlyMatMul(BlockFormat()).apply(model).counts["int4 block 32"] == 2
    assert sorted(model.graph.initializers) == ["w.int4", "w.int4.scales"]


def test_twice_is_once_and_bad_weights_are_named():
    bad = np.full((32, 8), np.nan, np.float32)
    model = linear(bad)
    changes = WeightOnlyMatMul(BlockFormat()).apply(model)
    assert not changes and "w: stays fp32" in changes.notes[0] and ops(model) == ["MatMul"]
    model = linear(np.ones((32, 8), np.float32))
    assert WeightOnlyMatMul(BlockFormat()).apply(model)
    assert not WeightOnlyMatMul(BlockFormat()).apply(model)


def table_model(table):
    sketch = Sketch()
    ids = sketch.input("ids", ["b", "s"], ir.DataType.INT64)
    out = sketch.node("Gather", [sketch.weight("table", table), ids], {"axis": 0}, shape=["b", "s", table.shape[1]])
    sketch.output("y", out)
    return sketch.model()


@pytest.mark.parametrize(
    "storage,operators", [("fp16", ["Gather", "Cast"]), ("int8", ["GatherBlockQuantized"]), ("int4", ["GatherBlockQuantized"])]
)
def test_embedding_table(storage, operators):
    table = RANDOM.standard_normal((100, 64)).astype(np.float32)
    model = table_model(table)
    assert EmbeddingStorage(storage).apply(model).counts[f"tables in {storage}"] == 1
    assert ops(model) == operators and "table" not in model.graph.initializers
    found = run(model, {"ids": np.arange(100)[None]})["y"][0]
    if storage == "fp16":
        wanted = table.astype(np.float16).astype(np.float32)
    else:
        wanted = stored_weight(table.T, BlockFormat(8 if storage == "int8" else 4)).T
    assert largest_difference(found, wanted) <= 1e-6
    assert not EmbeddingStorage(storage).apply(model)


def test_embedding_table_beyond_half_precision_stays():
    table = RANDOM.standard_normal((100, 64)).astype(np.float32)
    table[3, 3] = 1e6
    model = table_model(table)
    changes = EmbeddingStorage("fp16").apply(model)
    assert not changes and "beyond fp16" in changes.notes[0]
