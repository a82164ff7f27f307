"""The pre-flight check: every limit of the tables, each problem's place and way out, all of them at once."""

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from one_node import BUILDABLE, REFUSED, attention, dequantize, group_norm, reduce, scatter, scatter_nd, unary, weighted
from small_graphs import Sketch

from vlm_edge.targets import load_target
from vlm_edge.targets.import_table import load_table, table_for, table_names
from vlm_edge.targets.preflight import SCOPE, module_of, preflight, refuse
from vlm_edge_runtime.errors import TargetError


@pytest.mark.parametrize("name", BUILDABLE)
def test_what_can_be_built_has_no_problem(name):
    assert preflight(BUILDABLE[name](), load_target("rtx-40"), "graph") == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name):
    make, words = REFUSED[name]
    problems = preflight(make(), load_target("rtx-40"), "graph")
    assert len({problem.node for problem in problems}) == 1
    with pytest.raises(TargetError, match=words):
        refuse(problems, load_target("rtx-40"))


def test_each_jetpack_has_limits_of_its_own():
    older, newer = load_target("jetson-orin-nano-jp62"), load_target("jetson-orin-nano")
    norm = weighted("RMSNormalization", {"scale": np.ones(4, np.float32)}, opset=20, axis=-1)
    (problem,) = preflight(norm, older, "decoder")
    assert problem.op == "RMSNormalization" and problem.limit == "TensorRT 10.3 does not import it"
    assert "decompose it" in problem.way_out and "TensorRT 10.16" in problem.way_out
    assert preflight(norm, newer, "decoder") == []
    # 10.3 asks that the attribute is not written at all, though it says nothing new.
    assert preflight(scatter_nd(), older, "decoder") == []
    assert "is written down" in preflight(scatter_nd(reduction="none"), older, "decoder")[0].limit
    assert preflight(scatter_nd(reduction="none"), newer, "decoder") == []
    assert "opset 21" in preflight(group_norm(), older, "vision")[0].limit
    assert preflight(group_norm(), newer, "vision") == []
    # A newer operator is in no older table, in the RTX's alone.
    assert preflight(unary("Swish", opset=24), newer, "decoder")[0].op == "Swish"


def test_the_opset_has_a_ceiling():
    problems = preflight(unary("Relu", opset=23), load_target("jetson-orin-nano-jp62"), "projector")
    assert [problem.op for problem in problems] == ["opset"] and "opset 21" in problems[0].way_out


def test_formats_that_the_hardware_lacks():
    model = dequantize("fp8")
    assert preflight(model, load_target("rtx-40"), "decoder") == []
    (problem,) = preflight(model, load_target("jetson-orin-nano"), "decoder")
    assert "the device has no fp8 (SM 8.7)" in problem.limit and "int4" in problem.way_out


def test_a_target_of_ones_own_may_import_less(tmp_path):
    file = tmp_path / "old.toml"
    file.write_text('name = "old"\nextends = "rtx-40"\n[device]\nimports = ["RotaryEmbedding"]\n')
    (problem,) = preflight(attention(), load_target(file), "decoder")
    assert problem.limit == "this target does not import it"


def test_graphs_of_onnx_runtime_have_no_limits():
    assert preflight(attention(softcap=3.0), load_target("cpu-int4"), "decoder") == []
    assert preflight(attention(softcap=3.0), load_target("cuda-desktop"), "decoder") == []


def test_inputs_and_outputs_have_types_too():
    assert "DOUBLE" in preflight(unary("Relu", dtype=ir.DataType.DOUBLE), load_target("rtx-40"), "g")[0].limit


def test_branches_are_looked_into():
    branch = ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="then")
    made = ir.node("Det", [ir.Value(name="inner")], name="inside")
    branch.append(made)
    branch.outputs.append(made.outputs[0])
    sketch = Sketch()
    choice = sketch.input("choice", [], ir.DataType.BOOL)
    attributes = {"then_branch": branch, "else_branch": ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="else")}
    sketch.output("y", sketch.node("If", [choice], attributes, shape=[1], name="branch"))
    assert [problem.node for problem in preflight(sketch.model(), load_target("rtx-40"), "g")] == ["inside"]


def test_problems_name_the_module_they_came_from():
    model = scatter(axis=1)
    node = next(node for node in model.graph if node.op_type == "TensorScatter")
    node.metadata_props[SCOPE] = "model.layers.3.self_attn"
    (problem,) = preflight(model, load_target("rtx-40"), "decoder")
    assert (problem.graph, problem.node, problem.module) == ("decoder", "scatter", "model.layers.3.self_attn")


def test_nodes_that_passes_made_are_near_a_module():
    sketch = Sketch()
    value = sketch.input("x", [2])
    first = sketch.node("Relu", [value], shape=[2])
    second = sketch.node("Neg", [first], shape=[2])
    sketch.output("y", sketch.node("Abs", [second], shape=[2]))
    model = sketch.model()
    relu, neg, absolute = model.graph
    assert module_of(neg) == ""
    relu.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'model.vision', 'model.vision.act', 'relu']"
    assert module_of(relu) == "model.vision.act"
    assert module_of(neg) == module_of(absolute) == "near model.vision.act"


def test_all_problems_are_said_at_once():
    sketch = Sketch(24)
    value = sketch.input("x", [2, 4, 4])
    for number in range(3):
        value = sketch.node("Det", [value], shape=[2, 4, 4], name=f"det_{number}")
    value = sketch.node("TopK", [value, sketch.weight("k", np.array([5000]))], shapes=[[2], [2]], name="top")[0]
    sketch.output("y", value)
    target = load_target("rtx-40")
    problems = preflight(sketch.model(), target, "vision_encoder")
    assert [problem.node for problem in problems] == ["det_0", "det_1", "det_2", "top"]
    with pytest.raises(TargetError) as error:
        refuse(problems, target)
    text = str(error.value)
    assert text.startswith("4 nodes cannot be built for rtx-40")
    assert "Det 'det_0' and 2 more" in text and "TopK 'top'" in text
    refuse([], target)


def test_one_computed_axis_spoils_a_graph_and_a_stored_one_does_not():
    assert preflight(reduce(stored=False), load_target("jetson-orin-nano-jp62"), "g")
    assert [one.op for one in preflight(reduce(stored=True), load_target("jetson-orin-nano-jp62"), "g")] == ["opset"]


def test_tables():
    assert table_names() == ["tensorrt-10.13", "tensorrt-10.16", "tensorrt-10.3", "tensorrt-rtx-1.7"]
    native = {"Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization"}
    for name in table_names():
        table = load_table(name)
        assert table.sources and set(table.limits) <= set(table.ops)
        assert not set(table.missing) & set(table.ops)
        assert native <= set(table.ops) if table.version in ("10.16", "1.7") else not native & set(table.ops)
        assert all(table.types_of(op) for op in table.ops)


@pytest.mark.parametrize("versions,version", [(">=10.3,<10.4", "10.3"), (">=10.13.3,<10.14", "10.13"), (">=11.4", "10.16")])
def test_a_range_of_versions_has_the_table_of_its_oldest(versions, version):
    device = load_target("jetson-orin-nano").gpu()[0]
    assert table_for("tensorrt", msgspec.structs.replace(device, tensorrt=versions)).version == version


def test_a_version_older_than_every_table_is_refused():
    device = msgspec.structs.replace(load_target("jetson-orin-nano").gpu()[0], tensorrt=">=8.6,<9")
    with pytest.raises(TargetError, match=r"there are tables for: 10\.3, 10\.13, 10\.16"):
        table_for("tensorrt", device)
