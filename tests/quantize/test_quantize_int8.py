"""int8 activations and weights: dynamic, and static after calibration."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from small_graphs import Sketch, largest_difference, ops, run

from vlm_edge.passes.cleanup import Cleanup
from vlm_edge.quantize.calibrate import Histogram, activation_histograms
from vlm_edge.quantize.channelwise import channel_codes, channel_scales
from vlm_edge.quantize.dynamic import DynamicInt8MatMul
from vlm_edge.quantize.static import StaticInt8MatMul, calibrated_inputs

RANDOM = np.random.default_rng(0)
FIRST = (RANDOM.standard_normal((64, 48)) / 8).astype(np.float32)
SECOND = (RANDOM.standard_normal((48, 64)) / 8).astype(np.float32)
BIAS = RANDOM.standard_normal(48).astype(np.float32)
X = RANDOM.standard_normal((2, 30, 64)).astype(np.float32)


def layers():
    sketch = Sketch()
    wide = ["b", "s", 48]
    value = sketch.node("MatMul", [sketch.input("x", ["b", "s", 64]), sketch.weight("first", FIRST)], shape=wide)
    value = sketch.node("Relu", [sketch.node("Add", [value, sketch.weight("bias", BIAS)], shape=wide)], shape=wide)
    sketch.output("y", sketch.node("MatMul", [value, sketch.weight("second", SECOND)], shape=["b", "s", 64]))
    return sketch.model()


def loaded_ops(model, tmp_path):
    """The operators after ONNX Runtime's own fusions."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]


def weight_back(weight, bits):
    scales = channel_scales(weight, bits)
    return channel_codes(weight, scales, bits).astype(np.float32) * scales


def rounding_bound(x, weight, bits, step):
    """|x·w − x̂·ŵ| ≤ Σ|x||w − ŵ| + step · Σ|ŵ| (one step for the activation, its zero point included)."""
    back = weight_back(weight, bits)
    return np.abs(x) @ np.abs(weight - back) + step * np.abs(back).sum(0) + 1e-5


@pytest.mark.parametrize("bits", [7, 8])
def test_dynamic(bits, tmp_path):
    sketch = Sketch()
    product = sketch.node("MatMul", [sketch.input("x", ["b", "s", 64]), sketch.weight("first", FIRST)], shape=["b", "s", 48])
    sketch.output("y", product)
    model = sketch.model()
    assert DynamicInt8MatMul(weight_bits=bits).apply(model).counts["int8 dynamic"] == 1
    assert loaded_ops(model, tmp_path) == ["DynamicQuantizeMatMul"], "one fused kernel"
    codes = model.graph.initializers["first.int8"].const_value.numpy()
    assert codes.dtype == np.int8 and np.abs(codes).max() == (63 if bits == 7 else 127)
    step = (max(X.max(), 0) - min(X.min(), 0)) / 255
    found = run(model, {"x": X})["y"]
    assert np.isfinite(found).all() and (np.abs(found - X @ FIRST) <= rounding_bound(X, FIRST, bits, step)).all()


def test_dynamic_shares_the_quantised_input():
    sketch = Sketch()
    x = sketch.input("x", ["b", "s", 64])
    parts = [sketch.node("MatMul", [x, sketch.weight(name, FIRST * k)], shape=["b", "s", 48]) for k, name in enumerate("qkv", 1)]
    sketch.output("y", sketch.node("Sum", parts, shape=["b", "s", 48]))
    model = sketch.model()
    assert DynamicInt8MatMul().apply(model).counts["int8 dynamic"] == 3
    assert ops(model).count("DynamicQuantizeLinear") == 1


def test_7_bit_weights_cannot_saturate():
    """Every weight and activation at its extreme: pairs of 8-bit products overflow int16 on x86 without VNNI, 7-bit ones fit."""
    assert 2 * 255 * 63 <= 32767 < 2 * 255 * 127
    weight = np.ones((64, 8), np.float32)
    sketch = Sketch()
    sketch.output(
        "y", sketch.node("MatMul", [sketch.input("x", ["b", "s", 64]), sketch.weight("w", weight)], shape=["b", "s", 8])
    )
    model = sketch.model()
    DynamicInt8MatMul(weight_bits=7).apply(model)
    assert largest_difference(run(model, {"x": np.ones((1, 3, 64), np.float32)})["y"], np.full((1, 3, 8), 64, np.float32)) <= 1e-3


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "qdq"])
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_static(method, fused, tmp_path):
    model = layers()
    names = calibrated_inputs(model)
    assert names[0] == "x" and len(names) == 2
    histograms = activation_histograms(model, names, [{"x": X}, {"x": X / 2}])
    assert [value.name for value in model.graph.outputs] == ["y"], "the graph is as it was"
    thresholds = {name: one.threshold(method) for name, one in histograms.items()}
    assert thresholds["x"] <= np.abs(X).max() * (1 + 1e-6)
    assert StaticInt8MatMul(thresholds, fused=fused).apply(model).counts["int8 static"] == 2
    Cleanup().apply(model)
    assert loaded_ops(model, tmp_path).count("MatMulIntegerToFloat") == 2
    wanted, found = run(layers(), {"x": X})["y"], run(model, {"x": X})["y"]
    cosine = float((found * wanted).sum() / np.linalg.norm(found) / np.linalg.norm(wanted))
    assert cosine > 0.999, "two layers of 7-bit weights: rounding noise of about 1 % each"
    assert not StaticInt8MatMul(thresholds).apply(model)


def test_static_products_that_share_their_input_are_all_fused():
    sketch = Sketch()
    x = sketch.input("x", ["b", "s", 64])
    parts = [sketch.node("MatMul", [x, sketch.weight(name, FIRST * k)], shape=["b", "s", 48]) for k, name in enumerate("qkv", 1)]
    sketch.output("y", sketch.node("Sum", parts, shape=["b", "s", 48]))
    model = sketch.model()
    wanted = run(model, {"x": X})["y"]
    StaticInt8MatMul({"x": 4.0}, fused=True).apply(model)
    assert ops(model) == ["QuantizeLinear", *["MatMulIntegerToFloat"] * 3, "Sum"]
    found = run(model, {"x": X})["y"]
    bound = 6 * rounding_bound(np.clip(X, -4, 4), FIRST, 7, 4 / 127) + 6 * np.maximum(np.abs(X) - 4, 0) @ np.abs(FIRST)
    assert (np.abs(found - wanted) <= bound).all(), "weights of 1, 2 and 3 times the same matrix"


def test_static_is_independent_of_the_batch():
    model = layers()
    found = activation_histograms(model, calibrated_inputs(model), [{"x": X}])
    StaticInt8MatMul({name: one.threshold("minmax") for name, one in found.items()}).apply(model)
    together = run(model, {"x": np.concatenate([X[:1], X[1:] * 0.01])})["y"]
    assert largest_difference(run(model, {"x": X[:1]})["y"], together[:1]) <= 1e-6


def test_layers_can_be_kept():
    for graph_pass in (DynamicInt8MatMul(keep_first=1), StaticInt8MatMul({"x": 1.0}, keep_last=1)):
        model = layers()
        changes = graph_pass.apply(model)
        assert sum(changes.counts.values()) == 1 and "kept in fp32" in changes.notes[0]
        assert ops(model).count("MatMul") >= 1


def test_uncalibrated_layers_stay():
    model = layers()
    changes = StaticInt8MatMul({"x": 3.0}).apply(model)
    assert changes.counts["int8 static"] == 1 and "not calibrated" in changes.notes[0]


def test_weight_bits_are_checked():
    with pytest.raises(ValueError, match="7 or 8"):
        DynamicInt8MatMul(weight_bits=6)


class TestHistogram:
    def test_range_grows_and_keeps_all_counts(self):
        histogram = Histogram()
        for scale in (0.1, 1.0, 37.0):
            histogram.add(RANDOM.standard_normal(1000) * scale)
        assert histogram.counts.sum() == 3000 and histogram.limit >= histogram.largest

    def test_methods_on_an_outlier(self):
        """One value 100 times the others: minmax follows it, the others cut it off."""
        values = np.append(RANDOM.uniform(-1, 1, 100_000), 100.0)
        histogram = Histogram()
        histogram.add(values)
        assert histogram.threshold("minmax") == 100.0
        assert histogram.threshold("percentile") < 2.0
        limits = {method: histogram.threshold(method) for method in ("minmax", "mse")}

        def error(limit):
            codes = np.clip(np.rint(values / limit * 127), -127, 127)
            return np.square(codes * limit / 127 - values).sum()

        assert error(limits["mse"]) <= error(limits["minmax"])

    def test_zeros_and_nan(self):
        histogram = Histogram()
        histogram.add(np.zeros(5))
        assert histogram.threshold("mse") == 1.0
        with pytest.raises(ValueError, match="NaN"):
            histogram.add(np.array([np.nan]))


def test_no_calibration_inputs():
    model = layers()
    with pytest.raises(ValueError, match="no calibration inputs"):
        activation_histograms(model, calibrated_inputs(model), [])
