"""Decoders that see more than the past: blocks of tokens, biases by distance, cross-attention, added features."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from small_decoder import STEPS, Shape, decoder, feeds
from small_graphs import largest_difference, run

from vlm_edge.passes.group_query_attention import LowerToGroupQueryAttention
from vlm_edge.targets.pipeline import lower_decoder
from vlm_edge_runtime.errors import TargetError

TOLERANCE = 1e-4
SINGLE = tuple(step for step in STEPS if step[0] == 1 or step[2] == 0)
BATCHED = ((3, 1, 12), (2, 1, 3))


def lowered(shape):
    return lower_decoder(decoder(shape), precision="fp32", head="fp32", context_length=64)


def assert_same(shape, model, steps=STEPS, **ids):
    portable = decoder(shape)
    for batch, sequence, past in steps:
        old, new = feeds(shape, batch=batch, sequence=sequence, past=past)
        for name, value in ids.items():
            old[name] = new[name] = np.broadcast_to(np.array(value)[:sequence], (batch, sequence)).astype(np.int64)
        wanted, found = run(portable, old), run(model, new)
        for name, value in wanted.items():
            got = found[name] if name == "logits" else found[name][:, :, : past + sequence]
            value = value[:, -1:] if name == "logits" else value
            assert largest_difference(got, value) <= TOLERANCE, (name, batch, sequence, past)


BLOCKS = {
    "plain": Shape(mask="blocks"),
    "window on causal only": Shape(mask="blocks", window=4),
    "window on blocks too": Shape(mask="blocks", window=3, windowed_blocks=True),
    "one query group, soft-cap": Shape(mask="blocks", kv_heads=1, softcap=0.5),
    "rotation outside": Shape(mask="blocks", size=8),
    "no rotation": Shape(mask="blocks", rotary="none", bias=True),
    "interleaved": Shape(mask="blocks", rotary="interleaved"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    shape = BLOCKS[name]
    made = lowered(shape)
    operators = [node.op_type for node in made.model.graph]
    assert "GroupQueryAttention" not in operators and operators.count("If") == shape.layers + (2 if shape.window else 1)
    assert_same(shape, made.model)
    assert_same(shape, made.model, block_ids=[0] * 9)
    assert_same(shape, made.model, block_ids=[1] * 9)


def test_blocks_matter():
    """The mask of the second branch is read: with other blocks the answer is another."""
    shape = Shape(mask="blocks")
    model = lowered(shape).model
    _, new = feeds(shape, sequence=9, past=4)
    without = run(model, new | {"block_ids": np.zeros((1, 9), np.int64)})
    assert largest_difference(without["present.1.key"], run(model, new)["present.1.key"]) > 100 * TOLERANCE


@pytest.mark.parametrize("capacity", [16, 64])
def test_both_branches_write_into_one_buffer(capacity):
    """Past and present bound to the same memory, as the runtime does: prefill with a block, then tokens one by one."""
    shape = Shape(mask="blocks", window=6)
    model = lowered(shape).model
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    buffers = {
        f"{i}.{kind}": np.full((1, shape.kv_heads, capacity, shape.size), 7.0, np.float32)
        for i in range(shape.layers)
        for kind in ("key", "value")
    }
    cache = {name: np.zeros((1, shape.kv_heads, 0, shape.size), np.float32) for name in buffers}
    random = np.random.default_rng(3)
    portable, past = decoder(shape), 0
    for ids in ([0, 1, 1, 1, 0], [0], [2, 2, 2], [0], [0]):
        length = len(ids)
        step = {
            "inputs_embeds": random.standard_normal((1, length, shape.width)).astype(np.float32),
            "position_ids": np.arange(past, past + length)[None],
            "block_ids": np.array([ids]),
        }
        old = step | {"attention_mask": np.ones((1, past + length), np.int64)}
        wanted = run(portable, old | {f"past_key_values.{name}": array for name, array in cache.items()})
        binding = session.io_binding()
        lengths = {
            "seqlens_k": np.array([past + length - 1], np.int32),
            "total_sequence_length": np.array([past + length], np.int32),
        }
        for name, array in (step | lengths).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, array in buffers.items():
            for bind, side in ((binding.bind_input, "past_key_values"), (binding.bind_output, "present")):
                bind(f"{side}.{name}", "cpu", 0, np.float32, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu")
        session.run_with_iobinding(binding)
        assert largest_difference(binding.copy_outputs_to_cpu()[-1], wanted["logits"][:, -1:]) <= TOLERANCE
        past += length
        for name in buffers:
            cache[name] = wanted[f"present.{name}"]
            assert largest_difference(buffers[name][:, :, :past], cache[name]) <= TOLERANCE
            assert (buffers[name][:, :, past:] == 7.0).all(), "slots that are not used yet are left alone"


def test_a_mask_of_other_blocks_is_refused():
    model = decoder(Shape(mask="blocks", window=4, windowed_blocks=True))
    for node in model.graph:
        node.metadata_props.pop("vlm_edge.windowed_blocks", None)
    with pytest.raises(TargetError, match="is not blocks with window 4"):
        LowerToGroupQueryAttention().apply(model)


@pytest.mark.parametrize("bias_by", ["distance", "slope"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_bias_by_distance(bias_by, kv_heads):
    shape = Shape(mask="explicit", bias_by=bias_by, kv_heads=kv_heads, rotary="none")
    made = lowered(shape)
    assert_same(shape, made.model)
    tables = [name for name in made.model.graph.initializers if name.startswith("position_bias.table")]
    assert len(tables) == 1, "layers share the bias"


def test_bias_is_each_rows_own():
    """Rows of unlike length decode together: each one's bias counts from its own query."""
    shape = Shape(mask="explicit", bias_by="distance", rotary="none")
    model = lowered(shape).model
    lengths = np.array([3, 11, 7], np.int32)
    _, new = feeds(shape, batch=3, sequence=1, past=12)
    new["seqlens_k"], new["position_ids"] = lengths, lengths[:, None].astype(np.int64)
    new["total_sequence_length"] = np.array([lengths.max() + 1], np.int32)
    together = run(model, new)["logits"]
    for row, length in enumerate(lengths):
        one = {name: array[row : row + 1] for name, array in new.items()}
        one["total_sequence_length"] = np.array([length + 1], np.int32)
        assert largest_difference(run(model, one)["logits"], together[row : row + 1]) <= TOLERANCE


@pytest.mark.parametrize("mask,message", [("blocks", "depends on 'block_ids'"), ("prefix", "not causal")])
def test_an_explicit_mask_that_is_not_causal_is_refused(mask, message):
    with pytest.raises(TargetError, match=message):
        LowerToGroupQueryAttention().apply(_relabelled(Shape(mask=mask)))


def _relabelled(shape):
    model = decoder(shape)
    for node in model.graph:
        if "vlm_edge.mask" in node.metadata_props:
            node.metadata_props["vlm_edge.mask"] = "explicit"
    return model


@pytest.mark.parametrize("cross", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_cross_attention(cross):
    shape = Shape(cross=cross)
    made = lowered(shape)
    operators = [node.op_type for node in made.model.graph]
    assert "Attention" not in operators and operators.count("MultiHeadAttention") == shape.layers
    assert_same(shape, made.model)
    names = [value.name for value in made.model.graph.inputs]
    assert "encoder_attention_mask" in names and "attention_mask" not in names


def test_features_are_added_between_layers():
    shape = Shape(deepstack=True)
    made = lowered(shape)
    assert_same(shape, made.model)
    assert [value.name for value in made.model.graph.inputs].count("deepstack.1") == 1
