"""Bisecting on graphs of a few nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from vlm_edge.parity import first_divergence
from vlm_edge.parity.pairs import compare_values
from vlm_edge.parity.probe import Probe
from vlm_edge_runtime.errors import ParityError

RANDOM = np.random.default_rng(0)
FEEDS = {"x": RANDOM.normal(size=(3, 16)).astype(np.float32)}


def value(name, array):
    tensor = ir.tensor(np.asarray(array, np.float32), name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(np.shape(array)))


def chain(layers=4, *, width=16, names=lambda layer, what: f"{what}_{layer}"):
    """x → (LayerNormalization → MatMul → Add x) × layers; the weight is stored transposed, as after a tied embedding."""
    rng = np.random.default_rng(1)
    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3, width]))
    weights, nodes, current = [], [], source
    for layer in range(layers):
        scale, shift = value(f"scale_{layer}", np.ones(width)), value(f"shift_{layer}", np.zeros(width))
        stored = value(f"weight_{layer}", rng.normal(size=(width, width)))
        weights += [scale, shift, stored]

        def add(op, what, inputs, layer=layer, **attributes):
            node = ir.node(op, inputs, attributes, name=f"{what}_{layer}_node")
            node.outputs[0].name = names(layer, what)
            node.metadata_props["vlm_edge.scope"] = f"layers.{layer}.{what}"
            nodes.append(node)
            return node.outputs[0]

        normal = add("LayerNormalization", "norm", [current, scale, shift], epsilon=1e-5)
        product = add("MatMul", "product", [normal, add("Transpose", "turn", [stored])])
        add("Add", "sum", [product, current])
        current = nodes[-1].outputs[0]
    current.name, current.type, current.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([3, width])
    graph = ir.Graph([source], [current], nodes=nodes, initializers=weights, opset_imports={"": 23}, name="chain")
    return ir.Model(graph, ir_version=10)


def save(model, folder, name):
    """With the weights in a file beside it: the probe must find them without copying them."""
    folder.mkdir(exist_ok=True)
    ir.save(model, folder / name, external_data=f"{name}.data")
    return folder / name


def weight(model, name, edit):
    stored = model.graph.initializers[name]
    array = stored.const_value.numpy().copy()
    stored.const_value = ir.tensor(edit(array), name=name)


@pytest.fixture
def right(tmp_path):
    return save(chain(), tmp_path / "right", "g.onnx")


def test_nothing_is_found_between_equal_graphs(right, tmp_path):
    assert first_divergence(right, save(chain(), tmp_path / "other", "h.onnx"), FEEDS, 0.0) is None


def test_a_zeroed_block(right, tmp_path):
    def zero(array):
        array[:4, :4] = 0
        return array

    wrong = chain()
    weight(wrong, "weight_2", zero)
    found = first_divergence(right, save(wrong, tmp_path / "wrong", "g.onnx"), FEEDS, 1e-4, build="b", graph="g")
    assert (found.node, found.op, found.module) == ("product_2_node", "MatMul", "layers.2.product")
    assert found.before.within(1e-6) and not found.after.within(1e-4)
    assert "weight_2 has 16 of 256 values unlike the original, 16 of them zero" in found.reason
    assert str(found).startswith("b/g: product_2_node (MatMul) in layers.2.product")


def test_a_swapped_epsilon(right, tmp_path):
    wrong = chain()
    next(node for node in wrong.graph if node.name == "norm_1_node").attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.1)
    found = first_divergence(right, save(wrong, tmp_path / "wrong", "g.onnx"), FEEDS, 1e-4)
    assert found.node == "norm_1_node"
    assert "attribute epsilon" in found.reason
    assert found.candidates == []


def test_nan_is_found_where_it_begins(right, tmp_path):
    wrong = chain()
    weight(wrong, "scale_3", lambda array: np.full_like(array, np.nan))
    found = first_divergence(right, save(wrong, tmp_path / "wrong", "g.onnx"), FEEDS, 1e30)
    assert found.node == "norm_3_node"
    assert "NaN" in str(found)


def test_an_error_below_the_tolerance_is_none(right, tmp_path):
    wrong = chain()
    weight(wrong, "weight_0", lambda array: array * np.float32(1 + 1e-6))
    path = save(wrong, tmp_path / "wrong", "g.onnx")
    assert first_divergence(right, path, FEEDS, 1e-4) is None
    assert first_divergence(right, path, FEEDS, 1e-9).node == "product_0_node"


def test_values_without_a_partner_become_candidates(right, tmp_path):
    wrong = chain(names=lambda layer, what: f"{what}_{layer}" if what == "sum" else f"other_{what}_{layer}")
    for node in wrong.graph:
        node.name = f"other_{node.name}"
    next(node for node in wrong.graph if node.name == "other_norm_1_node").attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.1)
    found = first_divergence(right, save(wrong, tmp_path / "wrong", "g.onnx"), FEEDS, 1e-4)
    assert found.node == "other_sum_1_node"
    assert found.candidates == ["other_norm_1_node", "other_product_1_node"]


def test_more_values_than_one_run_exposes(tmp_path):
    right, wrong = chain(20), chain(20)
    weight(wrong, "weight_18", lambda array: array * 0)
    found = first_divergence(save(right, tmp_path / "r", "g.onnx"), save(wrong, tmp_path / "w", "g.onnx"), FEEDS, 1e-3)
    assert found.node == "product_18_node"


def test_graphs_that_share_nothing(right, tmp_path):
    other = chain(names=lambda layer, what: f"other_{what}_{layer}")
    other.graph.outputs[0].name = "z"
    for node in other.graph:
        node.name = f"other_{node.name}"
    with pytest.raises(ParityError, match="share no value"):
        first_divergence(right, save(other, tmp_path / "other", "g.onnx"), FEEDS, 1e-4)


def test_inputs_that_do_not_fit(right):
    with pytest.raises(ParityError, match="cannot be run"):
        first_divergence(right, right, {"x": np.zeros((3, 7), np.float32)}, 1e-4)


def test_a_file_that_is_no_graph(tmp_path, right):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(ParityError, match=r"broken\.onnx"):
        Probe(broken)


def test_looking_at_a_graph_changes_nothing_on_disk(right):
    before = {file: file.read_bytes() for file in right.parent.iterdir()}
    assert list(Probe(right).run(FEEDS, ["norm_1", "y"])) == ["norm_1", "y"]
    assert before == {file: file.read_bytes() for file in right.parent.iterdir()}


def test_a_cache_of_fixed_capacity_is_compared_where_the_other_grows():
    grown = RANDOM.normal(size=(1, 2, 5, 4)).astype(np.float32)
    fixed = np.concatenate([grown, np.full((1, 2, 3, 4), np.nan, np.float32)], axis=2)
    assert compare_values("present.0.key", fixed, grown).within(0.0)
    assert compare_values("hidden", fixed, grown) is None


def test_merged_heads_and_flattened_rows_are_laid_over_each_other():
    heads = RANDOM.normal(size=(1, 2, 5, 4)).astype(np.float32)
    merged = heads.transpose(0, 2, 1, 3).reshape(1, 5, 8)
    assert compare_values("hidden", merged, heads).within(0.0)
    assert not compare_values("hidden", heads.reshape(1, 5, 8), heads).within(0.1)
    assert compare_values("hidden", merged.reshape(5, 8), merged).within(0.0)
    assert compare_values("hidden", merged.reshape(8, 5), merged) is None
