"""Q/DQ graphs in TensorRT's form: int4 and int8 blocks, int8 and fp8 products, NVFP4 weights."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from small_graphs import Sketch, largest_difference, ops

from vlm_edge.passes.cleanup import Cleanup
from vlm_edge.passes.half_twin import half_twin, run_model
from vlm_edge.passes.islands import PRECISION
from vlm_edge.passes.strong_types import Islands, StrongTypes
from vlm_edge.quantize.blockwise import BlockFormat, choose_scales
from vlm_edge.quantize.calibrate import activation_histograms, channel_maxima
from vlm_edge.quantize.qdq_blockwise import BlockwiseDQ
from vlm_edge.quantize.qdq_fold import FoldWeights
from vlm_edge.quantize.qdq_formats import FP8, INT4, INT8, stored_scales
from vlm_edge.quantize.qdq_linear import LinearQDQ, activations_to_calibrate
from vlm_edge.quantize.qdq_nvfp4 import Nvfp4Weights, nvfp4_scales
from vlm_edge.quantize.smooth import SmoothActivations, smoothable

RANDOM = np.random.default_rng(0)
FIRST = (RANDOM.standard_normal((128, 96)) / 11).astype(np.float32)
HEAD = (RANDOM.standard_normal((96, 50)) / 10).astype(np.float32)
KERNEL = (RANDOM.standard_normal((16, 8, 3, 3)) / 8).astype(np.float32)
X = RANDOM.standard_normal((2, 9, 128)).astype(np.float32)


def layers(first=FIRST, output="logits", between="Relu"):
    """x [b, s, 128] → linear → `between` → linear: the second makes the logits."""
    sketch = Sketch()
    x = sketch.input("x", ["b", "s", first.shape[0]])
    value = sketch.node("MatMul", [x, sketch.weight("first", first)], shape=["b", "s", 96])
    value = sketch.node(between, [value], shape=["b", "s", 96])
    sketch.output(output, sketch.node("MatMul", [value, sketch.weight("head", HEAD)], shape=["b", "s", 50]))
    return sketch.model()


def convolution():
    sketch = Sketch()
    x = sketch.input("x", ["b", 8, 6, 6])
    bias = sketch.weight("bias", np.ones(16, np.float32))
    made = sketch.node("Conv", [x, sketch.weight("kernel", KERNEL), bias], {"pads": [1, 1, 1, 1]}, shape=["b", 16, 6, 6])
    sketch.output("y", made)
    return sketch.model()


def run(model, feeds):
    """As it is written: ONNX Runtime's own fusions quantise activations (int4, int8) or make graphs that do not load (fp8)."""
    return run_model(model, [feeds])[0]


def folded(model):
    """The same model with its weights dequantised by numpy; checks that some were."""
    plain = model.clone()
    assert FoldWeights().apply(plain)
    assert "DequantizeLinear" not in [node.op_type for node in plain.graph if node.inputs[0].const_value is not None]
    return plain


def cosine(left, right):
    left, right = left.astype(np.float64).ravel(), right.astype(np.float64).ravel()
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


def initializer(model, name):
    return np.asarray(model.graph.initializers[name].const_value.numpy())


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks(bits, block):
    model = layers()
    changes = BlockwiseDQ(bits, 8, block_size=block).apply(model)
    assert changes.counts == {f"int{bits}": 1, "int8 head": 1}
    node = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    assert len(node.inputs) == 2, "no zero point"
    assert node.attributes["axis"].as_int() == 0 and node.attributes["block_size"].as_int() == block
    codes, scales = initializer(model, f"first.int{bits}"), initializer(model, f"first.int{bits}.scales")
    assert codes.shape == FIRST.shape and scales.shape == (128 // block, 96)
    assert codes.dtype == (ml_dtypes.int4 if bits == 4 else np.int8)
    assert (scales > 0).all() and np.array_equal(scales, scales.astype(np.float16).astype(np.float32)), "as fp16 holds them"
    error = np.abs(codes.astype(np.float32) * np.repeat(scales, block, axis=0) - FIRST)
    clipped = np.abs(FIRST) > np.repeat(scales, block, axis=0) * (7 if bits == 4 else 127)
    assert (error <= np.repeat(scales, block, axis=0) / 2 * 1.001)[~clipped].all() and clipped.mean() < 0.1
    assert largest_difference(run(model, {"x": X})["logits"], run(folded(model), {"x": X})["logits"]) <= 1e-4
    wanted = run(layers(), {"x": X})["logits"]
    assert cosine(run(model, {"x": X})["logits"], wanted) > (0.98 if bits == 4 else 0.9999)
    assert not BlockwiseDQ(bits, 8, block_size=block).apply(model), "nothing is left to quantise"


def test_onnx_runtime_fuses_4_bits(tmp_path):
    model = layers(between="Tanh")  # ONNX Runtime 1.31 does not fuse a product ahead of a Relu
    BlockwiseDQ(4, 4, block_size=32).apply(model)
    assert model.graph.opset_imports[""] >= 21
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node] == ["MatMulNBits", "Tanh", "MatMulNBits"]
    assert largest_difference(session.run(["logits"], {"x": X})[0], run(folded(model), {"x": X})["logits"]) <= 1e-4


def test_block_that_divides_the_rows():
    model = layers(RANDOM.standard_normal((160, 96)).astype(np.float32))
    BlockwiseDQ(4, None, block_size=128).apply(model)
    assert initializer(model, "first.int4.scales").shape == (5, 96), "128 and 64 do not divide 160"
    assert "head" in model.graph.initializers, "the head was not asked for"
    odd = layers(RANDOM.standard_normal((100, 96)).astype(np.float32))
    changes = BlockwiseDQ(4, block_size=64).apply(odd)
    assert "int8 with one scale per channel" in changes.notes[0] and initializer(odd, "first.int8").dtype == np.int8


def test_positive_scales_cost_little():
    """A negative scale is one more candidate; TensorRT wants positive ones."""
    rows = RANDOM.standard_normal((200, 256)).astype(np.float32)

    def error(positive):
        form = BlockFormat(positive=positive)
        scales, _ = choose_scales(rows, form)
        assert (scales > 0).all() or not positive
        spread = np.repeat(scales, 32, axis=1)
        return np.square(rows - np.clip(np.rint(rows / spread), -8, 7) * spread).mean()

    assert error(False) <= error(True) <= 1.25 * error(False)


@pytest.mark.parametrize("form,least", [(INT8, 0.9999), (FP8, 0.998)], ids=["int8", "fp8"])
def test_products_with_calibrated_activations(form, least):
    model = layers(output="y")
    names = activations_to_calibrate(model.graph)
    assert len(names) == 2 and names[0] == "x"
    found = activation_histograms(model, names, [{"x": X}])
    changes = LinearQDQ(form, {name: one.threshold("minmax") for name, one in found.items()}).apply(model)
    assert changes.counts == {form.name: 2}
    assert ops(model).count("QuantizeLinear") == 2 and ops(model).count("DequantizeLinear") == 4
    zeros = [value for name, value in model.graph.initializers.items() if name.endswith(".zero")]
    assert [value.dtype for value in zeros] == [form.onnx] * 2 and not any(np.asarray(v.const_value.numpy()).any() for v in zeros)
    assert initializer(model, f"first.{form.name}.scales").shape == (96,)
    wanted, result = run(layers(output="y"), {"x": X})["y"], run(model, {"x": X})["y"]
    assert least < cosine(result, wanted) < 1
    assert largest_difference(result, run(folded(model), {"x": X})["y"]) <= 1e-4


@pytest.mark.parametrize("form,least", [(INT8, 0.9999), (FP8, 0.999)], ids=["int8", "fp8"])
def test_weights_alone(form, least):
    model = layers()
    assert LinearQDQ(form, None, head=True).apply(model).counts == {f"{form.name} weights": 1, f"{form.name} head weights": 1}
    assert "QuantizeLinear" not in ops(model)
    assert cosine(run(model, {"x": X})["logits"], run(layers(), {"x": X})["logits"]) > least
    assert set(model.graph.initializers) == {f"{n}.{form.name}{end}" for n in ("first", "head") for end in ("", ".scales")}


def test_the_head_is_left_unless_asked_for():
    model = layers()
    LinearQDQ(INT8, {"x": 4.0}).apply(model)
    assert "head" in model.graph.initializers
    only = layers()
    assert LinearQDQ(INT8, None, body=False, head=True).apply(only).counts == {"int8 head weights": 1}


def test_layers_that_are_kept_or_not_calibrated():
    model = layers(output="y")
    changes = LinearQDQ(INT8, {"x": 4.0}, keep_last=1).apply(model)
    assert changes.counts == {"int8": 1} and changes.notes == ["head: kept (first 0, last 1 layers)"]
    model = layers(output="y")
    changes = LinearQDQ(INT8, {"x": 4.0}).apply(model)
    assert changes.counts == {"int8": 1} and "head: stays as it is: its input was not calibrated" in changes.notes


@pytest.mark.parametrize("form", [INT8, FP8], ids=["int8", "fp8"])
def test_convolutions(form):
    x = RANDOM.standard_normal((2, 8, 6, 6)).astype(np.float32)
    model = convolution()
    LinearQDQ(form, {"x": float(np.abs(x).max())}).apply(model)
    assert initializer(model, f"kernel.{form.name}.scales").shape == (16,)
    assert cosine(run(model, {"x": x})["y"], run(convolution(), {"x": x})["y"]) > 0.998
    assert all(node.metadata_props[PRECISION] == "fp32" for node in model.graph), "TensorRT wants fp32 scales here"
    StrongTypes(islands=Islands(norms=False, softmax=False)).apply(model)
    scales = [value for name, value in model.graph.initializers.items() if "scale" in name]
    assert {value.dtype for value in scales} == {ir.DataType.FLOAT}
    weights = convolution()
    LinearQDQ(form, None).apply(weights)
    StrongTypes().apply(weights)
    assert next(node for node in weights.graph if node.op_type == "Conv").outputs[0].dtype == ir.DataType.FLOAT16


def test_shared_input_is_quantised_once():
    sketch = Sketch()
    x = sketch.input("x", ["b", "s", 128])
    parts = [sketch.node("MatMul", [x, sketch.weight(name, FIRST * k)], shape=["b", "s", 96]) for k, name in enumerate("qkv", 1)]
    sketch.output("y", sketch.node("Sum", parts, shape=["b", "s", 96]))
    model = sketch.model()
    LinearQDQ(INT8, {"x": 4.0}).apply(model)
    assert ops(model).count("QuantizeLinear") == 1 and ops(model).count("DequantizeLinear") == 4


def test_nvfp4():
    model = layers()
    assert Nvfp4Weights().apply(model).counts == {"nvfp4": 1}
    codes = model.graph.initializers["first.fp4"].const_value
    assert codes.dtype == ir.DataType.FLOAT4E2M1 and model.graph.opset_imports[""] >= 23
    blocks, whole = initializer(model, "first.fp4.scales"), initializer(model, "first.fp4.scale")
    assert blocks.shape == (8, 96) and float(blocks.astype(np.float32).max()) == 448, (
        "the largest block takes fp8's largest number"
    )
    back = np.asarray(codes.numpy()).astype(np.float32) * np.repeat(blocks.astype(np.float32) * whole, 16, axis=0)
    steps = np.repeat(np.abs(FIRST).reshape(8, 16, 96).max(1), 16, axis=0) / 6
    assert (np.abs(back - FIRST) <= steps * 1.07).all(), "codes are 0, ½, 1, 1½, 2, 3, 4, 6 steps; a step is rounded to 1 in 16"
    wanted, found = run(layers(), {"x": X})["logits"], run(folded(model), {"x": X})["logits"]
    assert 0.98 < cosine(found, wanted) < 1
    StrongTypes().apply(model)
    assert model.graph.initializers["first.fp4.scale"].dtype == ir.DataType.FLOAT, "fp16 has no such small numbers"
    assert next(node for node in model.graph if node.op_type == "MatMul").outputs[0].dtype == ir.DataType.FLOAT16
    assert cosine(run(half_twin(folded(model)), {"x": X})["logits"], found) > 0.9999


def test_what_cannot_be_quantised_is_noted():
    broken = FIRST.copy()
    broken[3, 4] = np.nan
    for graph_pass in (BlockwiseDQ(4), LinearQDQ(INT8, None), Nvfp4Weights()):
        model = layers(broken)
        changes = graph_pass.apply(model)
        assert "first: stays as it is: the weight has NaN or infinite values" in changes.notes[0]
        assert "first" in model.graph.initializers and np.isnan(initializer(model, "first")).any()
    model = layers(RANDOM.standard_normal((100, 96)).astype(np.float32))
    assert "100 rows are no multiple of 16" in Nvfp4Weights().apply(model).notes[0]
    with pytest.raises(ValueError, match="NaN"):
        nvfp4_scales(np.full((16, 4), np.inf, np.float32))


def test_narrow_matrices_stay():
    """A gate with one output: TensorRT refuses blocks with a single scale."""
    for graph_pass in (BlockwiseDQ(4), LinearQDQ(INT8, None), Nvfp4Weights()):
        sketch = Sketch()
        gate = sketch.node(
            "MatMul", [sketch.input("x", ["b", "s", 128]), sketch.weight("gate", FIRST[:, :1])], shape=["b", "s", 1]
        )
        sketch.output("y", gate)
        assert not graph_pass.apply(sketch.model())


def test_misuse():
    with pytest.raises(ValueError, match="block_size must be one of"):
        BlockwiseDQ(4, block_size=16)
    with pytest.raises(ValueError, match="int8 or fp8"):
        LinearQDQ(INT4, None)


def test_scales_as_they_are_stored():
    scales = np.array([0.0, 1e-9, 3e-5, 0.0123, 7.0])
    kept = stored_scales(scales, np.float16)
    assert kept[0] == 1 and kept[1] == 2.0**-20 and np.array_equal(kept, kept.astype(np.float16).astype(np.float32))
    assert np.allclose(kept[2:], scales[2:], rtol=2e-3)


def test_quantised_graph_in_half_precision():
    """Typing converts scales exactly: the codes were chosen for what fp16 holds."""
    for graph_pass in (BlockwiseDQ(4, 8, block_size=32), LinearQDQ(INT8, {"x": 4.5}, head=False), LinearQDQ(FP8, None)):
        model = layers()
        graph_pass.apply(model)
        Cleanup().apply(model)
        wanted = run(model, {"x": X})["logits"]
        StrongTypes().apply(model)
        scales = [value.dtype for name, value in model.graph.initializers.items() if "scale" in name]
        assert scales and set(scales) == {ir.DataType.FLOAT16}
        assert largest_difference(run(half_twin(model), {"x": X})["logits"], wanted) <= 5e-3 * np.abs(wanted).max()
        assert run(model, {"x": X.astype(np.float16)})["logits"].dtype == np.float32


def normed(outliers=50.0):
    """LayerNormalization whose third channel is much larger than the others → two linear layers."""
    sketch = Sketch()
    gain = np.ones(128, np.float32)
    gain[3] = outliers
    x = sketch.input("x", ["b", "s", 128])
    norm = [sketch.weight("gain", gain), sketch.weight("shift", np.full(128, 0.1, np.float32))]
    value = sketch.node("LayerNormalization", [x, *norm], {"axis": -1}, shape=["b", "s", 128], name="norm")
    for name, factor in (("first", 1), ("second", 2)):
        sketch.output(f"{name}.out", sketch.node("MatMul", [value, sketch.weight(name, FIRST * factor)], shape=["b", "s", 96]))
    return sketch.model()


def test_smoothing_changes_nothing_but_the_ranges():
    model = normed()
    names = [str(norm.outputs[0].name) for norm in smoothable(model.graph)]
    maxima = channel_maxima(model, names, [{"x": X}])
    before = next(iter(maxima.values()))
    assert before[3] > 20 * np.median(before)
    assert SmoothActivations(maxima).apply(model).counts == {"activations smoothed": 1}
    after = next(iter(channel_maxima(model, names, [{"x": X}]).values()))
    assert after[3] < before[3] / 4 and (after <= before * 1.0001).all(), "no channel grows"
    wanted, found = run(normed(), {"x": X}), run(model, {"x": X})
    assert all(largest_difference(found[name], wanted[name]) <= 1e-4 * np.abs(wanted[name]).max() for name in wanted)
    assert isinstance(model.graph.initializers["first.smooth"].const_value, ir.LazyTensor)


def test_smoothing_saves_the_small_channels():
    errors = {}
    for strength in (0.0, 0.5):
        model = normed()
        names = [str(norm.outputs[0].name) for norm in smoothable(model.graph)]
        SmoothActivations(channel_maxima(model, names, [{"x": X}]), strength).apply(model) if strength else None
        found = activation_histograms(model, activations_to_calibrate(model.graph), [{"x": X}])
        LinearQDQ(INT8, {name: one.threshold("minmax") for name, one in found.items()}).apply(model)
        errors[strength] = 1 - cosine(run(model, {"x": X})["first.out"], run(normed(), {"x": X})["first.out"])
    assert errors[0.5] < errors[0.0] / 2


def test_smoothing_leaves_norms_that_something_else_reads():
    model = normed()
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    model.graph.outputs.append(norm.outputs[0])
    assert not smoothable(model.graph)
    assert not SmoothActivations({str(norm.outputs[0].name): np.ones(128, np.float32)}).apply(model)
    with pytest.raises(ValueError, match="between 0 and 1"):
        SmoothActivations({}, 1.5)
