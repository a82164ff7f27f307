"""What Cohere's decoders write out: a norm of centred rows, and a rotation of neighbouring numbers."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from vlm_edge.passes.centred_norm import FuseCentredNorm
from vlm_edge.passes.recompose_rotary import RecomposeRotary

CENTRED = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[batch,sequence,8] x, float[8] w) => (float[batch,sequence,8] y)
<float[batch,sequence,1] mean, float[batch,sequence,8] apart, int64[1] last = {-1}>
{
    mean = ReduceMean <keepdims = 1> (x, last)
    apart = Sub (x, mean)
    y = RMSNormalization <axis = -1, epsilon = 0.001> (apart, w)
}
"""
TURNED = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[batch,4,sequence,16] x, float[batch,sequence,8] angles) => (float[batch,4,sequence,16] y)
<float[batch,sequence,8,2] twice, int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3},
 int64[1] end = {1000}, int64[1] last = {-1},
 int64[4] pair = {1, 1, 1, 2}, int64[3] flat = {0, 0, 16}, int64[4] merged = {0, 0, 0, 16}>
{
    column = Unsqueeze (angles, three)
    twice = Expand (column, pair)
    whole = Reshape (twice, flat)
    cos = Cos (whole)
    sin = Sin (whole)
    cos4 = Unsqueeze (cos, one)
    sin4 = Unsqueeze (sin, one)
    plain = Mul (x, cos4)
    even = Slice (x, zero, end, three, two)
    odd = Slice (x, one, end, three, two)
    negative = Neg (odd)
    left = Unsqueeze (negative, last)
    right = Unsqueeze (even, last)
    pairs = Concat <axis = -1> (left, right)
    rotated = Reshape (pairs, merged)
    turned = Mul (rotated, sin4)
    y = Add (plain, turned)
}
"""


def run(model: ir.Model, feeds):
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def same(text: str, graph_pass, feeds, operators) -> None:
    model = ir.from_onnx_text(text)
    wanted = run(model, feeds)
    assert graph_pass.apply(model)
    assert [node.op_type for node in model.graph if node.op_type != "Constant"] == operators
    np.testing.assert_allclose(run(model, feeds), wanted, rtol=0, atol=2e-6)


def test_a_norm_of_centred_rows_is_a_layer_norm():
    random = np.random.default_rng(0)
    feeds = {"x": random.normal(3, 1, (2, 5, 8)).astype(np.float32), "w": random.normal(0, 1, 8).astype(np.float32)}
    same(CENTRED, FuseCentredNorm(), feeds, ["LayerNormalization"])


def test_neighbours_that_turn_together_are_one_rotation():
    random = np.random.default_rng(0)
    feeds = {
        "x": random.normal(size=(2, 4, 3, 16)).astype(np.float32),
        "angles": random.normal(size=(2, 3, 8)).astype(np.float32),
    }
    same(TURNED, RecomposeRotary(interleaved=True), feeds, ["Cos", "Sin", "RotaryEmbedding"])
    assert not RecomposeRotary().apply(ir.from_onnx_text(TURNED)), "TensorRT and CUDA keep it written out"


def test_other_pairs_are_left_alone():
    for old, new in (("Slice (x, one, end", "Slice (x, zero, end"), ("(left, right)", "(right, left)")):
        assert old in TURNED
        assert not RecomposeRotary(interleaved=True).apply(ir.from_onnx_text(TURNED.replace(old, new)))
    assert not FuseCentredNorm().apply(ir.from_onnx_text(CENTRED.replace("Sub (x, mean)", "Sub (mean, x)")))
