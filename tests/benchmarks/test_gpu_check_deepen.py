"""Graphs whose repeated layer is repeated more often compute what the deeper model computes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "runtimes" / "native"))

from toy_decoder import Toy

from benchmarks.gpu_check.deepen import NotPeriodic, deepen

KINDS = {"plain": {}, "rotary": {"rotary": True}, "cross": {"cross": True, "feature": True}}


def _weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {weight.name: numpy_helper.to_array(weight) for weight in model.graph.initializer}


def _with_weights(model: onnx.ModelProto, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    for number, weight in enumerate(model.graph.initializer):
        if weight.name in weights:
            model.graph.initializer[number].CopyFrom(numpy_helper.from_array(weights[weight.name], weight.name))
    return model


def _layered(layer: int, deep: int) -> int:
    """Which of four layers the layer of a model of `deep` is: the first and the last are themselves, the others the second."""
    return 0 if layer == 0 else 3 if layer == deep - 1 else 1


def _feeds(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    sizes = {"batch": 2, "sequence": 1, "capacity": 12, "past": 5, "total": 6, "source": 3}
    feeds = {}
    for value in session.get_inputs():
        shape = [sizes.get(size, size) for size in value.shape]
        if value.name == "seqlens_k":
            feeds[value.name] = np.array([5, 5], np.int32)
        elif value.name == "total_sequence_length":
            feeds[value.name] = np.array([6], np.int32)
        elif "mask" in value.name:
            feeds[value.name] = np.ones(shape, np.int64)
        elif value.type == "tensor(int64)":
            feeds[value.name] = np.full(shape, 5, np.int64)
        else:  # the same numbers for an input of any model that has it
            seed = sum(value.name.encode())
            feeds[value.name] = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return feeds


@pytest.mark.parametrize("form", ["lowered_model", "portable_model"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_deepened_graph_is_the_deeper_model(kind, form) -> None:
    deep = 7
    small = onnx.load_from_string(getattr(Toy(layers=4, **KINDS[kind]), form)())
    wanted = onnx.load_from_string(getattr(Toy(layers=deep, **KINDS[kind]), form)())
    known = _weights(small)
    for name in [name for name in known if name.endswith("2")]:
        known[name] = known[f"{name[:-1]}1"]  # the two layers between the first and the last are equal
    small = _with_weights(small, known)
    given = {}
    for name in _weights(wanted):
        stem, digit = name[:-1], name[-1]
        layered = f"{stem}{_layered(int(digit), deep)}" if digit.isdigit() else ""
        given[name] = known[layered] if layered in known else known[name]
    wanted = _with_weights(wanted, given)
    model = ir.serde.deserialize_model(small)
    deepen(model, deep, of=4)
    found = ir.to_proto(model)
    onnx.checker.check_model(found)
    assert [v.name for v in found.graph.input] == [v.name for v in wanted.graph.input]
    assert [v.name for v in found.graph.output] == [v.name for v in wanted.graph.output]
    assert len(found.graph.node) == len(wanted.graph.node)
    sessions = [onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]) for m in (found, wanted)]
    feeds = _feeds(sessions[0])
    for got, expected in zip(*(session.run(None, feeds) for session in sessions), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)
    sizes = [sum(array.size for array in _weights(m).values()) for m in (found, wanted)]
    assert sizes[0] == sizes[1]  # every layer has weights of its own


def test_graphs_without_layers_are_refused() -> None:
    model = ir.serde.deserialize_model(onnx.load_from_string(Toy(layers=1).lowered_model()))
    with pytest.raises(NotPeriodic, match="no part of the"):
        deepen(model, 6, of=4)
    with pytest.raises(ValueError, match="cannot be made one of 2"):
        deepen(model, 2, of=4)
