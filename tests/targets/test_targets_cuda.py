"""Graphs for ONNX Runtime on CUDA, run on the CPU provider: the same operators, in half precision.

What only a GPU can show (that its kernels take the graphs) is asked of the kernels' documented limits instead.
"""

import numpy as np
import onnx_ir as ir
import pytest
import small_decoder
from small_graphs import Sketch, largest_difference, run

from vlm_edge.passes.cuda_kernels import CudaKernels
from vlm_edge.passes.dtypes import inner_graphs
from vlm_edge.passes.half_twin import half_twin
from vlm_edge.targets.build import build
from vlm_edge.targets.cuda import NoSharedBuffer, lower_for_cuda
from vlm_edge.targets.samples import Samples, run_graph, session
from vlm_edge.targets.selfcheck import check_decoder, check_encoder
from vlm_edge_runtime.bundle.reader import open_bundle

CONTEXT = 64
FUSED = {
    "GroupQueryAttention",
    "MultiHeadAttention",
    "SkipSimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "MatMulNBits",
}
"""com.microsoft operators of these graphs: the CUDA provider has fp16 kernels for all (ONNX Runtime, docs/OperatorKernels.md)."""
SHAPES = {
    "plain": small_decoder.Shape(),
    "window": small_decoder.Shape(window=4, softcap=20.0),
    "gemm": small_decoder.Shape(norm="LayerNormalization", bias=True, gemm=True, rotary="none"),
    "blocks": small_decoder.Shape(mask="blocks", window=6),
    "mrope": small_decoder.Shape(rotary="mrope"),
    "cross": small_decoder.Shape(cross=2),
}


def lowered(shape, precision="fp16", head=None, **options):
    model = small_decoder.decoder(shape)
    low = lower_for_cuda(model, kind="decoder", precision=precision, head=head, context_length=CONTEXT, **options)
    return model, low


def all_nodes(graph):
    for node in graph:
        yield node
        for inner in inner_graphs(node):
            yield from all_nodes(inner)


def half(feeds, model):
    dtypes = {value.name: value.dtype.numpy() for value in model.graph.inputs}
    return {name: array.astype(dtypes[name]) for name, array in feeds.items() if name in dtypes}


@pytest.mark.parametrize("name", list(SHAPES))
def test_decoders(name):
    """fp16 throughout but for the logits, and the same numbers: as ONNX Runtime computes it, and as a GPU rounds it."""
    shape = SHAPES[name]
    model, low = lowered(shape)
    kinds = {value.name: value.dtype for value in [*model.graph.inputs, *model.graph.outputs]}
    assert kinds["logits"] == ir.DataType.FLOAT and kinds["inputs_embeds"] == ir.DataType.FLOAT16
    assert (
        kinds["past_key_values.0.key"] == kinds["present.0.key"] == ir.DataType.FLOAT16
        and kinds["seqlens_k"] == ir.DataType.INT32
    )
    fused = [node for node in all_nodes(model.graph) if node.domain == "com.microsoft"]
    assert {node.op_type for node in fused} <= FUSED
    attentions = [node for node in fused if node.op_type == "GroupQueryAttention"]
    assert len(attentions) == shape.layers and all(node.outputs[0].dtype == ir.DataType.FLOAT16 for node in attentions)
    twin = half_twin(model)
    for batch, sequence, past in ((1, 5, 0), (1, 1, 30), (3, 1, 12), (1, 3, 6)):
        portable, feeds = small_decoder.feeds(shape, batch=batch, sequence=sequence, past=past)
        wanted = run(small_decoder.decoder(shape), portable)["logits"][:, -1:]
        for found in (run(model, half(feeds, model)), run(twin, half(feeds, twin))):
            assert found["logits"].shape == (batch, 1, shape.vocab)
            assert largest_difference(found["logits"], wanted) <= 1e-2 * np.abs(wanted).max(), (batch, sequence, past)
    assert low.changed


@pytest.mark.parametrize("precision,head,bits,least", [("int8", None, [8, 8], 0.999), ("int4", "int8", [4, 8], 0.97)])
def test_weights(precision, head, bits, least):
    shape = SHAPES["gemm"]
    model, _ = lowered(shape, precision, head, block_size=16)
    products = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert [products[0].attributes["bits"].as_int(), products[-1].attributes["bits"].as_int()] == bits
    assert not [node for node in model.graph if node.op_type == "MatMul"]
    assert {node.inputs[2].dtype for node in products} == {ir.DataType.FLOAT16}
    portable, feeds = small_decoder.feeds(shape, sequence=5, past=0)
    wanted = run(small_decoder.decoder(shape), portable)["logits"][:, -1:].ravel()
    found = run(model, half(feeds, model))["logits"].astype(np.float64).ravel()
    assert least < found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted) < 1


@pytest.mark.parametrize(
    "shape,precision,why",
    [
        (small_decoder.Shape(mask="explicit", bias_by="distance", rotary="none"), "fp16", "a bias by distance"),
        (small_decoder.Shape(size=12, rotary="none"), "fp16", "heads of 12; the CUDA kernel takes multiples of 8"),
        (small_decoder.Shape(), "fp32", "half precision only"),
    ],
    ids=["bias", "heads", "fp32"],
)
def test_what_the_fused_kernel_cannot_take_grows(shape, precision, why):
    with pytest.raises(NoSharedBuffer, match=why):
        lowered(shape, precision)
    model, low = lowered(shape, precision, grows=why)
    assert any(why in note and "grows at every token" in note for note in low.notes)
    assert "attention_mask" in [value.name for value in model.graph.inputs]
    portable, _ = small_decoder.feeds(shape, sequence=3, past=4)
    wanted = run(small_decoder.decoder(shape), portable)["logits"][:, -1:]
    bound = 1e-2 if precision == "fp16" else 1e-4
    assert largest_difference(run(model, half(portable, model))["logits"], wanted) <= bound * np.abs(wanted).max()


@pytest.mark.parametrize("precision", [None, "decoder=int4", "fp32"], ids=["fp16", "int4", "fp32"])
def test_whole_build(vlm_bundle, precision):
    made = build(vlm_bundle, "cuda-desktop", precision=precision)
    assert made.backend == "ort-cuda"
    opened = open_bundle(vlm_bundle, build="cuda-desktop")
    dtypes = {spec.name: spec.dtype for entry in made.graphs.values() for spec in [*entry.inputs, *entry.outputs]}
    if precision == "fp32":
        assert made.options["decoder.kv_cache"] == "growing" and set(dtypes.values()) == {"float32", "int64"}
        assert made.options["decoder.relative"] <= 1e-4
        return
    assert made.kv.shared_buffer and made.kv.dtype == "float16" and made.options["decoder.kv_cache"] == "shared"
    assert {name for name, dtype in dtypes.items() if dtype == "float32"} == {"pixel_values", "logits"}
    assert made.options["vision_encoder.cosine"] > 0.9999
    assert made.options["decoder.cosine"] > (0.9999 if precision is None else 0.97)
    embed = session(opened.graph_path("embed_tokens"))
    given = {"input_ids": np.array([[1, 2, 3]])}
    assert run_graph(embed, given)["inputs_embeds"].dtype == np.float16


def test_dual_encoder(dual_bundle):
    made = build(dual_bundle, "cuda-desktop")
    outputs = [spec.dtype for entry in made.graphs.values() for spec in entry.outputs]
    assert outputs and set(outputs) == {"float32"}, "what the host reads"
    assert all(made.options[f"{role}.cosine"] > 0.9999 for role in made.graphs)


@pytest.mark.parametrize("name", ["tiny-llava", pytest.param("tiny-smolvlm", marks=pytest.mark.slow)])
def test_trained_models(name, portable_bundle, tmp_path):
    """Every graph in fp16, and the decoder with 8 and 4 bits."""
    bundle = open_bundle(portable_bundle(name))
    samples = Samples(bundle)
    for role, least in (("vision_encoder", 0.99999), ("projector", 0.99999), ("embed_tokens", 0.99999)):
        kind = "embedding" if role == "embed_tokens" else "encoder"
        low = lower_for_cuda(ir.load(bundle.graph_path(role)), kind=kind, precision="fp16")
        ir.save(low.model, tmp_path / "graph.onnx", external_data="graph.data")
        assert check_encoder(bundle, role, tmp_path / "graph.onnx", samples).cosine > least
    for precision, head, least in (("fp16", "fp16", 0.99999), ("int8", "int8", 0.999), ("int4", "int8", 0.97)):
        model = ir.load(bundle.graph_path("decoder"))
        lower_for_cuda(model, kind="decoder", precision=precision, head=head, context_length=256)
        for name, graph in (("typed", model), ("twin", half_twin(model))):
            ir.save(graph, tmp_path / f"{name}.onnx", external_data=f"{name}.data")
            assert check_decoder(bundle, tmp_path / f"{name}.onnx", samples).cosine > least, (precision, name)


def test_whole_numbers_go_through_fp32():
    """ArgMax of token ids, and a padded mask of block numbers: the CUDA provider has these kernels for floats only."""
    sketch = Sketch()
    ids = sketch.input("ids", ["batch", 4], ir.DataType.INT64)
    ends = sketch.weight("ends", np.array([0, 2, 0, 1]))
    seven = sketch.weight("seven", np.array(7))
    padded = sketch.node("Pad", [ids, ends, seven], shape=["batch", "padded"], dtype=ir.DataType.INT64)
    where = sketch.node("ArgMax", [padded], {"axis": 1, "keepdims": 0}, shape=["batch"], dtype=ir.DataType.INT64)
    sketch.output("padded", padded)
    sketch.output("where", where)
    model = sketch.model()
    given = {"ids": np.array([[3, 49407, 5, 1], [9, 2, 6, 4]])}
    wanted = run(model, given)
    assert CudaKernels().apply(model).counts == {"Pad through fp32": 1, "ArgMax through fp32": 1}
    assert {str(value.dtype) for value in model.graph.outputs} == {"INT64"}
    assert all(node.inputs[0].dtype == ir.DataType.FLOAT for node in model.graph if node.op_type in ("Pad", "ArgMax"))
    found = run(model, given)
    assert all(np.array_equal(found[name], wanted[name]) for name in ("padded", "where"))
    assert not CudaKernels().apply(model)
