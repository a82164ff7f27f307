"""Shared weights: equal tensors and transposes are stored once, and what is read back is what was written."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from vlm_edge.export.weights import INLINE_BYTES, WeightFile


def _product(weight: np.ndarray, name: str = "w") -> ir.Model:
    """`y = x · weight`."""
    x = ir.val("x", ir.DataType.FLOAT, ["rows", weight.shape[0]])
    value = ir.Value(name=name, const_value=ir.tensor(weight, name=name), type=ir.TensorType(ir.DataType.FLOAT))
    value.shape = ir.Shape(weight.shape)
    node = ir.node("MatMul", [x, value])
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", x.type, ir.Shape(["rows", weight.shape[1]])
    graph = ir.Graph([x], [y], nodes=[node], initializers=[value], opset_imports={"": 23}, name="product")
    return ir.Model(graph, ir_version=10)


def _run(file, x: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_equal_tensors_are_stored_once(tmp_path):
    weight = _random(96, 64)
    with WeightFile(tmp_path) as weights:
        assert weights.save(_product(weight), "a.onnx")
        assert weights.save(_product(weight.copy(), "other"), "b.onnx")
    assert weights.path.stat().st_size == weight.nbytes
    x = _random(3, 96, seed=1)
    for file in ("a.onnx", "b.onnx"):
        assert np.allclose(_run(tmp_path / file, x), x @ weight, atol=1e-4)


def test_a_transpose_is_stored_once(tmp_path):
    table = _random(300, 64)
    with WeightFile(tmp_path) as weights:
        weights.save(_product(table), "table.onnx")
        weights.save(_product(np.ascontiguousarray(table.T), "head"), "head.onnx")
    assert weights.path.stat().st_size == table.nbytes
    turned = ir.load(tmp_path / "head.onnx")
    assert [node.op_type for node in turned.graph] == ["Transpose", "MatMul"]
    x = _random(2, 64, seed=1)
    assert np.allclose(_run(tmp_path / "head.onnx", x), x @ table.T, atol=1e-4)


def test_different_tensors_are_kept_apart_on_page_boundaries(tmp_path):
    first, second = _random(40, 40), _random(40, 40, seed=1)
    with WeightFile(tmp_path) as weights:
        weights.save(_product(first), "a.onnx")
        weights.save(_product(second), "b.onnx")
    stored = [ir.load(tmp_path / file).graph.initializers["w"].const_value for file in ("a.onnx", "b.onnx")]
    assert [tensor.offset for tensor in stored] == [0, 8192]
    assert np.array_equal(stored[1].numpy(), second)


def test_small_tensors_stay_in_the_model(tmp_path):
    small = _random(8, 8)
    assert small.nbytes <= INLINE_BYTES
    with WeightFile(tmp_path) as weights:
        assert not weights.save(_product(small), "a.onnx")
    assert weights.path.stat().st_size == 0


def test_same_bytes_of_another_shape_are_not_the_same(tmp_path):
    weight = _random(64, 32)
    with WeightFile(tmp_path) as weights:
        weights.save(_product(weight), "a.onnx")
        weights.save(_product(weight.reshape(32, 64)), "b.onnx")
    x = _random(2, 32, seed=1)
    assert np.allclose(_run(tmp_path / "b.onnx", x), x @ weight.reshape(32, 64), atol=1e-4)
