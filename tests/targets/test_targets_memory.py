"""The memory plan against numbers worked out by hand, what it refuses, and what it proposes instead."""

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from one_node import scatter
from sketch_bundle import embedding, projector_contract, write_bundle
from small_decoder import Shape, decoder
from small_graphs import Sketch

from vlm_edge.targets import load_target
from vlm_edge.targets.activations import peak_activations
from vlm_edge.targets.device import GIB
from vlm_edge.targets.examine import examine
from vlm_edge.targets.memory_plan import BUILD_BASE, GraphMemory, graph_memory, memory_plan, refuse_memory
from vlm_edge_runtime.bundle.engine_profile import EngineProfile, ShapeRange
from vlm_edge_runtime.bundle.manifest import KVLayout
from vlm_edge_runtime.errors import TargetError

HALF = ir.DataType.FLOAT16
MIB = 2**20


def profile(**shapes: tuple[int, ...]) -> EngineProfile:
    return EngineProfile(shapes={name: ShapeRange(min=shape, opt=shape, max=shape) for name, shape in shapes.items()})


def chain() -> ir.Model:
    """x [rows, 4] → a = x·W [rows, 8] → b = Relu(a) → c = b·V [rows, 2], all float32."""
    sketch = Sketch()
    value = sketch.input("x", ["rows", 4])
    wide = sketch.node("MatMul", [value, sketch.weight("W", np.ones((4, 8), np.float32))], shape=["rows", 8], name="wide")
    bent = sketch.node("Relu", [wide], shape=["rows", 8], name="bent")
    sketch.output("c", sketch.node("MatMul", [bent, sketch.weight("V", np.ones((8, 2), np.float32))], shape=["rows", 2]))
    return sketch.model()


def test_peak_of_a_chain():
    # x and c are there all the time: 4·(4 + 2) bytes a row; a and b together at Relu: 4·(8 + 8).
    peak = peak_activations(chain(), {"x": (10, 4)})
    assert (peak.bytes, peak.node, peak.scores, peak.guessed) == (10 * 4 * (6 + 16), "bent", 0, 0)


def test_views_take_nothing_and_live_as_long_as_what_they_look_at():
    sketch = Sketch()
    value = sketch.input("x", ["rows", 4])
    made = sketch.node("Relu", [value], shape=["rows", 4])
    view = sketch.node("Reshape", [made, sketch.weight("flat", np.array([-1]))], shape=["flat"])
    other = sketch.node("Relu", [view], shape=["flat"], name="other")
    back = sketch.node("Reshape", [other, sketch.weight("back", np.array([-1, 4]))], shape=["rows", 4])
    sketch.output("y", sketch.node("Add", [back, made], shape=["rows", 4], name="sum"))
    # x, y, and made (kept by its second reader) beside other.
    assert peak_activations(sketch.model(), {"x": (3, 4)}).bytes == 3 * 4 * 4 * 4


def test_sizes_follow_from_shapes_computed_in_the_graph():
    sketch = Sketch()
    value = sketch.input("x", ["rows", 4])
    rows = sketch.node("Shape", [value], {"start": 0, "end": 1}, shape=[1], dtype=ir.DataType.INT64)
    wanted = sketch.node("Concat", [rows, sketch.weight("eight", np.array([8]))], {"axis": 0}, shape=[2], dtype=ir.DataType.INT64)
    column = sketch.node("ReduceMax", [value, sketch.weight("axis", np.array([1]))], {"keepdims": 1}, shape=None)
    wide = sketch.node("Expand", [column, wanted], shape=None, name="wide")
    for out in (column, wide):
        out.shape = None
    sketch.output("y", sketch.node("Relu", [wide], shape=["rows", 8]))
    peak = peak_activations(sketch.model(), {"x": (5, 4)})
    assert peak.guessed == 0
    # x and y; then, at Expand, its result beside the column and the two numbers of the shape.
    assert (peak.bytes, peak.node) == (4 * 5 * (4 + 8) + 4 * 5 * 8 + 4 * 5 + 2 * 8, "wide")


def test_what_only_weights_go_into_is_no_activation():
    sketch = Sketch()
    value = sketch.input("x", [1, 64])
    stored = sketch.weight("q", np.ones((64, 32), np.int8))
    read = sketch.node("DequantizeLinear", [stored, sketch.weight("s", np.array(0.1, np.float32))], shape=[64, 32])
    sketch.output("y", sketch.node("MatMul", [value, read], shape=[1, 32]))
    assert peak_activations(sketch.model(), {}).bytes == 4 * (64 + 32)


def test_the_cache_is_counted_by_itself():
    assert peak_activations(scatter(), {}).bytes == 4 * 2 * 8 + 8  # update and write position


def test_graph_memory_takes_the_largest_profile():
    made = graph_memory(chain(), "g", "projector", "fp32", [profile(x=(1, 4)), profile(x=(10, 4))])
    assert made.weights == 4 * (4 * 8 + 8 * 2)
    assert made.activations == 10 * 4 * 22


def memory(role="decoder", word="fp16", weights=GIB, **more) -> GraphMemory:
    given = {"elements": weights // 2, "activations": 100 * MIB} | more
    return GraphMemory(name=role, role=role, word=word, weights=weights, **given)


KV = KVLayout(layers=10, kv_heads=4, head_dim=64, dtype="float16")
ENTRY = 2 * 10 * 4 * 64 * 2
"""Bytes of a token in that cache: keys and values, layers, heads, numbers, width."""


def test_a_plan_adds_up():
    plan = memory_plan(
        [memory("vision_encoder", weights=200 * MIB), memory()], load_target("rtx-4090"), kv=KV, context=4096, batch=3
    )
    assert plan.kv_cache == ENTRY * 4096 * 3
    assert plan.weights == pytest.approx(1.05 * (1024 + 200) * MIB, abs=4)
    assert plan.activations == 200 * MIB
    assert plan.total == plan.weights + plan.kv_cache + plan.activations
    assert (plan.capacity, plan.reserved) == (24 * GIB, GIB)
    assert (plan.build_least, plan.build_most) == (BUILD_BASE + 2 * GIB, BUILD_BASE + 6 * GIB)  # the decoder is the largest
    assert plan.fits and not plan.build_on_device and plan.advice == ""
    refuse_memory(plan)


def test_a_double_buffer_is_counted_twice_and_contexts_once():
    target = load_target("jetson-orin-nano-jp62")
    decoders = [memory(in_place=False), memory(in_place=False, activations=300 * MIB)]
    plan = memory_plan(decoders, target, kv=KV, context=1024, batch=1)
    assert plan.kv_cache == 2 * ENTRY * 1024
    assert plan.activations == 300 * MIB
    assert plan.others == decoders[0].engine + 100 * MIB
    assert any("engines of other contexts" in note for note in plan.notes)


def test_too_long_a_context_names_the_longest_that_fits():
    target = load_target("jetson-orin-nano")
    decoder = memory(word="int4", weights=GIB, elements=16 * GIB // 10)
    plan = memory_plan([decoder], target, kv=KV, context=900_000, batch=1, longest=900_000)
    assert not plan.fits
    left = 6 * GIB - plan.weights - 100 * MIB
    fitting = left // ENTRY // 64 * 64
    with pytest.raises(TargetError, match=f"a context of {fitting} tokens"):
        refuse_memory(plan)
    again = memory_plan([decoder], target, kv=KV, context=fitting, batch=1, longest=900_000)
    assert again.fits
    assert not memory_plan([decoder], target, kv=KV, context=fitting + 128, batch=1, longest=900_000).fits


def test_too_many_rows_name_one_row():
    plan = memory_plan([memory()], load_target("rtx-4060"), kv=KV, context=65_536, batch=16, longest=65_536)
    assert not plan.fits and "65536 tokens with one row at a time" in plan.advice


def test_too_much_weight_names_the_finest_precision_that_fits():
    decoder = memory(weights=14 * GIB, elements=7 * GIB)  # 7 G weights in fp16
    plan = memory_plan([decoder], load_target("jetson-orin-nx"), kv=KV, context=1024, batch=1)
    assert not plan.fits
    # int8 would run in 8.3 GiB, but compiling it needs twice its weights: only 4 bits fit in 13.5 GiB.
    with pytest.raises(TargetError, match="What would fit: decoder in int4") as error:
        refuse_memory(plan)
    assert "a context of" not in str(error.value)
    desktop = memory_plan([decoder], load_target("rtx-4080"), kv=KV, context=1024, batch=1)
    assert desktop.fits  # 14.7 GiB of 15, compiled elsewhere
    small = memory_plan([decoder], load_target("rtx-4070"), kv=KV, context=1024, batch=1)
    assert "decoder in int8" in small.advice


def test_nothing_fits_is_said_as_well():
    plan = memory_plan(
        [memory(weights=60 * GIB, elements=30 * GIB)], load_target("jetson-orin-nano"), kv=None, context=0, batch=1
    )
    with pytest.raises(TargetError, match="Nothing smaller that this target can build would fit"):
        refuse_memory(plan)


def test_compiling_on_the_device_counts_and_warns_before_it_refuses():
    nano = load_target("jetson-orin-nano")
    tight = memory_plan([memory(weights=GIB)], nano, kv=None, context=0, batch=1)
    assert tight.fits and any("compiling may need up to 6.39 GiB" in note for note in tight.notes)
    with pytest.raises(TargetError, match=r"compiling on the device needs at least 6\.39 GiB"):
        refuse_memory(memory_plan([memory(weights=3 * GIB)], nano, kv=None, context=0, batch=1))


def test_each_graph_is_compiled_by_itself():
    graphs = [memory("vision_encoder", weights=180 * MIB), memory(word="int4", weights=120 * MIB)]
    plan = memory_plan(graphs, load_target("jetson-orin-nano"), kv=None, context=0, batch=1)
    assert (plan.build_least, plan.build_most) == (BUILD_BASE + 360 * MIB, BUILD_BASE + 1200 * MIB)


def test_attention_scores_are_told_apart():
    plan = memory_plan([memory(scores=3 * GIB)], load_target("rtx-4060"), kv=None, context=0, batch=1)
    assert plan.fits and "3.00 GiB more" in plan.notes[0]


def test_a_bundle_is_examined_without_writing_anything(vlm_bundle):
    before = sorted(vlm_bundle.rglob("*"))
    found = examine(vlm_bundle, "rtx-4090", context=64, batch=2)
    assert found.problems == []
    plan = found.plan()
    assert (plan.context, plan.batch) == (64, 2)
    assert {graph.name for graph in plan.graphs} == {"vision_encoder", "projector", "embed_tokens", "decoder.c64"}
    layout = msgspec.structs.asdict(found._kv)
    assert plan.kv_cache == 2 * layout["layers"] * layout["kv_heads"] * layout["head_dim"] * 2 * 64 * 2
    embed = next(graph for graph in plan.graphs if graph.role == "embed_tokens")
    assert embed.weights == 80 * 64 * 2  # the table in half precision
    assert sorted(vlm_bundle.rglob("*")) == before
    assert examine(vlm_bundle, "rtx-4090", context=64, batch=2).plan() == plan, "the same every time"


def test_the_context_stops_where_the_model_does(vlm_bundle):
    assert examine(vlm_bundle, "jetson-orin-nano-jp62").plan().context == 128


def test_a_target_of_the_cpu_is_refused(vlm_bundle):
    with pytest.raises(TargetError, match="describes no GPU"):
        examine(vlm_bundle, "cpu-int4")


@pytest.mark.slow
def test_the_plan_of_a_decoder_of_smolvlm_256m(tmp_path):
    """30 layers of 576, 9 heads and 3 for the cache, 49,280 words: its sizes are known from its shape alone."""
    shape = Shape(layers=30, heads=9, kv_heads=3, size=64, width=576, vocab=49_280, ffn=1536)
    contract = msgspec.structs.replace(projector_contract(shape), context_length=8192)
    contract.modalities = []
    graphs = {"embed_tokens": embedding(shape.vocab, shape.width), "decoder": decoder(shape)}
    bundle = write_bundle(tmp_path / "smol.vlm", graphs, contract)
    body, head = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536), 576 * 49_280
    token = 2 * 30 * 3 * 64 * 2
    for target, word, width, copies in (
        ("rtx-4090", "fp16", 2.0, 1),
        ("jetson-orin-nano", "int4", 0.5 + 2 / 128, 1),
        ("jetson-orin-nano-jp62", "int4", 0.5 + 2 / 128, 2),
    ):
        found = examine(bundle, target, context=4096, batch=1)
        plan = found.plan()
        graph = next(one for one in plan.graphs if one.role == "decoder")
        assert found.problems == [] and plan.fits
        assert (graph.name, graph.word, graph.in_place) == ("decoder.c4096", word, copies == 1)
        # Norms and rotary tables come on top of the products: less than 2 MB.
        assert 0 <= graph.weights - (body * width + head * 2) < 2e6
        assert graph.elements == pytest.approx(body + head, rel=0.01)
        assert plan.kv_cache == token * 4096 * copies
        # At the least the hidden states of a chunk in and out of the widest product, and the logits' products beside them.
        assert 1024 * (576 + 2 * 1536) * 2 < graph.activations < 1.5e9
