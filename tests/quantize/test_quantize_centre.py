"""Means taken out of activations, and outliers moved into weights: the same result, over smaller activations."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from vlm_edge.passes.base import run_passes
from vlm_edge.passes.evaluate import session_of
from vlm_edge.quantize.calibrate import channel_maxima, channel_means, watched_values
from vlm_edge.quantize.centre import CentreActivations, centrable
from vlm_edge.quantize.smooth import SmoothActivations, smoothable

WIDTH, OUT = 8, 6


def block(*, skip: bool, read: bool = False) -> ir.Model:
    """A norm with a gain and a shift, and two products of it, the first with a bias. `read`: its output is read too."""
    random = np.random.default_rng(0)
    arrays = {
        "gain": random.uniform(0.5, 2, WIDTH),
        "shift": np.where(np.arange(WIDTH) == 3, 20, 0.1 * random.standard_normal(WIDTH)),
        "left": random.standard_normal((WIDTH, OUT)),
        "right": random.standard_normal((WIDTH, OUT)),
        "bias": random.standard_normal(OUT),
    }
    stored = {
        name: ir.Value(name=name, const_value=ir.tensor(array.astype(np.float32), name=name)) for name, array in arrays.items()
    }
    for name, value in stored.items():
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(arrays[name].shape)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(("batch", 5, WIDTH)))
    if skip:
        norm = ir.node(
            "SkipLayerNormalization", [x, x, stored["gain"], stored["shift"]], {"epsilon": 1e-5}, domain="com.microsoft"
        )
    else:
        norm = ir.node("LayerNormalization", [x, stored["gain"], stored["shift"]], {"axis": -1, "epsilon": 1e-5})
    left = ir.node("MatMul", [norm.outputs[0], stored["left"]])
    with_bias = ir.node("Add", [left.outputs[0], stored["bias"]])
    right = ir.node("MatMul", [norm.outputs[0], stored["right"]])
    nodes = [norm, left, with_bias, right]
    outputs = [with_bias.outputs[0], right.outputs[0], *([norm.outputs[0]] if read else [])]
    for node in nodes:
        node.outputs[0].name, node.outputs[0].type = f"{node.op_type}_{id(node)}", ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(("batch", 5, WIDTH if node is norm else OUT))
    for number, value in enumerate(outputs):
        value.name = f"y{number}"
    norm.outputs[0].name = "normed" if not read else norm.outputs[0].name
    opsets = {"": 23, "com.microsoft": 1}
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=list(stored.values()), name="block", opset_imports=opsets)
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model) -> list[np.ndarray]:
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 5, WIDTH)).astype(np.float32)}
    return [np.asarray(one) for one in session_of(model).run(["y0", "y1"], feeds)]


def feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(seed).standard_normal((2, 5, WIDTH)).astype(np.float32)} for seed in (2, 3)]


@pytest.mark.parametrize("skip", [False, True])
def test_means_go_into_biases_and_change_nothing(skip):
    model = block(skip=skip)
    wanted = run(model)
    changes = run_passes(model, [CentreActivations(channel_means(model, ["normed"], feeds()))])[0]
    assert changes.counts == {"activations centred": 1}
    for found, one in zip(run(model), wanted, strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-4, atol=1e-4)
    left = channel_means(model, ["normed"], feeds())["normed"]
    assert np.abs(left).max() < 1e-4, "what is left has no means"


@pytest.mark.parametrize("skip", [False, True])
def test_outliers_go_into_weights_and_change_nothing(skip):
    model = block(skip=skip)
    wanted = run(model)
    before = channel_maxima(model, ["normed"], feeds())["normed"]
    run_passes(model, [SmoothActivations({"normed": before}, 0.6)])
    for found, one in zip(run(model), wanted, strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-4, atol=1e-4)
    after = channel_maxima(model, ["normed"], feeds())["normed"]
    assert after[3] < 0.5 * before[3] and (after <= before * 1.001).all()


def test_a_wrong_shift_would_be_seen():
    model = block(skip=False)
    wanted = run(model)
    run_passes(model, [CentreActivations(channel_means(model, ["normed"], feeds()))])
    shift = next(node for node in model.graph if node.op_type == "LayerNormalization").inputs[2]
    shift.const_value = ir.tensor(shift.const_value.numpy() + 0.1, name=shift.name)
    assert max(np.abs(found - one).max() for found, one in zip(run(model), wanted, strict=True)) > 1e-2


def test_what_others_read_stays():
    model = block(skip=False, read=True)
    assert not smoothable(model.graph) and not centrable(model.graph)
    assert not run_passes(model, [CentreActivations({"y2": np.ones(WIDTH, np.float32)})])[0]


def test_means_that_are_not_numbers_are_left():
    model = block(skip=False)
    means = np.full(WIDTH, np.nan, np.float32)
    assert not run_passes(model, [CentreActivations({"normed": means})])[0]
    assert not any(found["normed"].size == 0 for found in watched_values(model, ["normed"], feeds()))
