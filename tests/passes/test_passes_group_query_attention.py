"""Attention → GroupQueryAttention against the portable decoder, on ONNX Runtime, step by step."""

import numpy as np
import pytest
from small_decoder import STEPS, Shape, decoder, feeds
from small_graphs import largest_difference, ops, run

from vlm_edge.passes.cleanup import Cleanup
from vlm_edge.passes.group_query_attention import LowerToGroupQueryAttention
from vlm_edge_runtime.errors import TargetError

TOLERANCE = 1e-4


def lowered(shape):
    model = decoder(shape)
    Cleanup().apply(model)
    changes = LowerToGroupQueryAttention().apply(model)
    assert changes.counts["Attention → GroupQueryAttention"] == shape.layers
    return model


def assert_same(shape, model, steps=STEPS, offset=0):
    portable = decoder(shape)
    for batch, sequence, past in steps:
        old, new = feeds(shape, batch=batch, sequence=sequence, past=past, offset=offset)
        wanted, found = run(portable, old), run(model, new)
        for name, value in wanted.items():
            got = found[name][:, -value.shape[1] :] if name == "logits" else found[name][:, :, : past + sequence]
            value = value[:, -got.shape[1] :] if name == "logits" else value
            assert largest_difference(got, value) <= TOLERANCE, (name, batch, sequence, past)


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("size", [8, 16, 32, 64, 80])
def test_heads_and_sizes(heads, kv_heads, size):
    shape = Shape(layers=1, heads=heads, kv_heads=kv_heads, size=size)
    assert_same(shape, lowered(shape))


@pytest.mark.parametrize("window", [4, 16])
def test_sliding_window_beyond_its_length(window):
    shape = Shape(window=window)
    model = lowered(shape)
    windows = [node.attributes.get("local_window_size") for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert windows[0].as_int() == window and windows[1] is None
    assert_same(shape, model)


def test_softcap_that_bites():
    assert_same(Shape(softcap=0.5), lowered(Shape(softcap=0.5)))


def test_without_rotation_and_with_biases():
    shape = Shape(rotary="none", norm="LayerNormalization", bias=True, gemm=True)
    assert_same(shape, lowered(shape))


def test_signature():
    model = lowered(Shape())
    inputs = {value.name: (value.dtype.name, [str(d) for d in value.shape]) for value in model.graph.inputs}
    assert "attention_mask" not in inputs
    assert inputs["seqlens_k"] == ("INT32", ["batch"])
    assert inputs["total_sequence_length"] == ("INT32", ["1"])
    assert inputs["past_key_values.1.value"] == ("FLOAT", ["batch", "2", "capacity", "16"])
    assert [str(d) for d in model.graph.outputs[1].shape] == ["batch", "2", "capacity", "16"]
    assert not {"Range", "Where", "LessOrEqual"} & set(ops(model)), "the mask-building nodes are gone"


def test_twice_is_once():
    model = lowered(Shape())
    before = ops(model)
    assert not LowerToGroupQueryAttention().apply(model)
    assert ops(model) == before


def test_keeps_metadata():
    model = lowered(Shape(window=4))
    node = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    assert node.metadata_props["vlm_edge.layer"] == "0" and node.metadata_props["vlm_edge.sliding_window"] == "4"


@pytest.mark.parametrize("kind", ["prefix", "bidirectional"])
def test_refuses_masks_that_are_not_causal(kind):
    with pytest.raises(TargetError, match=kind):
        lowered(Shape(mask=kind))


def test_refuses_a_mask_that_is_not_what_it_says():
    model = decoder(Shape(window=4))
    for node in model.graph:
        node.metadata_props.pop("vlm_edge.sliding_window", None)
    with pytest.raises(TargetError, match="is not causal"):
        LowerToGroupQueryAttention().apply(model)


def test_refuses_attention_without_metadata():
    model = decoder(Shape())
    for node in model.graph:
        node.metadata_props.clear()
    with pytest.raises(TargetError, match="export the bundle again"):
        LowerToGroupQueryAttention().apply(model)


def test_refuses_another_reader_of_the_past():
    import onnx_ir as ir

    model = decoder(Shape())
    length = ir.node("Shape", [model.graph.inputs[3]])
    model.graph.append(length)
    length.outputs[0].name, length.outputs[0].type = "past_shape", ir.TensorType(ir.DataType.INT64)
    model.graph.outputs.append(length.outputs[0])
    with pytest.raises(TargetError, match="read by Shape"):
        LowerToGroupQueryAttention().apply(model)


def test_rows_of_different_length_decode_together():
    """seqlens_k is per row: a batch step equals each row's own step."""
    shape = Shape()
    model = lowered(shape)
    lengths = np.array([3, 11], np.int32)
    _, new = feeds(shape, batch=2, sequence=1, past=12)
    new["seqlens_k"], new["position_ids"] = lengths, lengths[:, None].astype(np.int64)
    new["total_sequence_length"] = np.array([lengths.max() + 1], np.int32)
    together = run(model, new)["logits"]
    for row, length in enumerate(lengths):
        one = {k: v[row : row + 1] for k, v in new.items() if k not in ("total_sequence_length",)}
        one["total_sequence_length"] = np.array([length + 1], np.int32)
        assert largest_difference(run(model, one)["logits"], together[row : row + 1]) <= TOLERANCE
