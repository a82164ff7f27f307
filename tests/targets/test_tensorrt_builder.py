"""One graph through the real builder: what is checked before and after, and what is said of mistakes."""

import threading
import warnings

import numpy as np
import onnx_ir as ir
import pytest
from engine_builds import HALF, SMS, Remembered, cached_attention, linear, save, value
from onnx import TensorProto, helper

from vlm_edge.targets import load_target
from vlm_edge.targets.tensorrt import builder, seam
from vlm_edge.targets.tensorrt.builder import compile_engine
from vlm_edge.targets.tensorrt.progress import BuildProgress, run_watched
from vlm_edge.targets.tensorrt.seam import load_library
from vlm_edge_runtime.bundle.engine_profile import EngineProfile, ShapeRange
from vlm_edge_runtime.errors import TargetError


@pytest.fixture(scope="module")
def rtx():
    return load_library(load_target("rtx-40"), (89,), gpu=None)


def fixed(*sizes):
    return ShapeRange(min=sizes, opt=sizes, max=sizes)


def profile(**shapes):
    return EngineProfile(shapes={name: one if isinstance(one, ShapeRange) else fixed(*one) for name, one in shapes.items()})


def rows(width=64):
    return profile(x=ShapeRange(min=(1, width), opt=(1, width), max=(8, width)))


def cache_sizes(sequence, batch=1, **more):
    heads = {"q": 4, "k": 2, "v": 2}
    shapes = {name: (batch, count, sequence, 16) for name, count in heads.items()}
    shapes |= {f"past_key_values.0.{part}": (batch, 2, 64, 16) for part in ("key", "value")}
    return profile(**shapes, past_lengths=(batch,), **more)


def test_an_engine_for_one_gpu_and_for_three(rtx, tmp_path):
    path = linear(tmp_path / "linear.onnx")
    one = compile_engine(rtx, path, profiles=[rows()], sm=[86])
    three = compile_engine(rtx, path, profiles=[rows()], sm=SMS)
    assert one.data.nbytes > 64 * 64 * 2, "the weights are in it"
    assert three.warnings == one.warnings == []
    assert three.layers.types["MATRIX_MULTIPLY"] == 1 and three.layers.compared == 2


def test_a_cache_is_updated_in_place(rtx, tmp_path):
    path = cached_attention(tmp_path / "decoder.onnx")
    mask = {"mask": (1, 1, 4, 64)}
    two = [cache_sizes(4, **mask), cache_sizes(1, batch=2, mask=(2, 1, 1, 64))]
    made = compile_engine(rtx, path, profiles=two, sm=[86])
    assert made.layers.aliases == {f"present.0.{part}": f"past_key_values.0.{part}" for part in ("key", "value")}
    assert made.layers.types["ATTENTION_INPUT"] == 1 and made.layers.types["KV_CACHE_UPDATE"] == 2
    assert made.warnings == []


def test_an_input_that_the_parser_leaves_out(rtx, tmp_path):
    """Attention's lengths: the parser takes the graph, drops the input, and the engine would read slots that hold nothing."""
    path = cached_attention(tmp_path / "decoder.onnx", mask=False)
    with pytest.raises(TargetError, match=r"no layer reads the input lengths \(node 'attention' \(Attention\)\)"):
        compile_engine(rtx, path, profiles=[cache_sizes(4, lengths=(1,))], sm=[86])


def test_the_warning_alone_fails_too(rtx, tmp_path, monkeypatch):
    """Should the check of layers not see it, TensorRT's own remark does."""
    monkeypatch.setattr("vlm_edge.targets.tensorrt.network._check_inputs", lambda *arguments: None)
    path = cached_attention(tmp_path / "decoder.onnx", mask=False)
    with pytest.raises(TargetError, match="Unused Input: lengths"):
        compile_engine(rtx, path, profiles=[cache_sizes(4, lengths=(1,))], sm=[86])


def test_a_node_that_the_parser_refuses_is_named_with_its_module(rtx, tmp_path):
    inputs = [value("x", [1, 4, 64]), value("past", [1, 2, "past", 32])]
    node = helper.make_node("Attention", ["x", "x", "x", "", "past", "past"], ["y", "new_k", "new_v"], name="attend")
    node.attribute.extend([helper.make_attribute("q_num_heads", 2), helper.make_attribute("kv_num_heads", 2)])
    outputs = [value("y", [1, 4, 64]), value("new_k", [1, 2, "total", 32]), value("new_v", [1, 2, "total", 32])]
    path = save(tmp_path / "past.onnx", [node], inputs, outputs)
    model = ir.load(path)
    model.graph[0].metadata_props["vlm_edge.scope"] = "model.layers.0.self_attn"
    ir.save(model, path)
    with pytest.raises(
        TargetError, match=r"does not take .*node 'attend' \(Attention\) of module 'model\.layers\.0\.self_attn': "
    ):
        compile_engine(rtx, path, profiles=[], sm=[86])


def test_a_lost_attention_is_seen(rtx, tmp_path):
    """The graph says one more Attention than the network has: taken apart behind our back it would be."""
    from vlm_edge.targets.tensorrt.network import check_network

    path = cached_attention(tmp_path / "decoder.onnx")
    graph = ir.load(path)
    log = builder._Log()
    listener = log.listener(rtx)
    maker = rtx.module.Builder(listener)
    network, parser = builder._parsed(rtx, maker, listener, graph, path)
    assert check_network(rtx, network, graph, path).types["ATTENTION_INPUT"] == 1
    graph.graph.append(ir.Node("", "Attention", graph.graph[3].inputs, name="another"))
    with pytest.raises(TargetError, match=r"of 2 Attention nodes the parser kept 1 whole; first lost: node 'another'"):
        check_network(rtx, network, graph, path)
    del parser


@pytest.mark.parametrize(
    "edit,message",
    [
        (lambda graph: graph.outputs.pop(1), "its cache must be an input of the graph and its result an output"),
        (
            lambda graph: setattr(graph.inputs[0], "type", ir.TensorType(ir.DataType.FLOAT)),
            "'q' of an input is FLOAT in the graph",
        ),
    ],
)
def test_a_network_that_is_not_the_graph(rtx, tmp_path, edit, message):
    from vlm_edge.targets.tensorrt.network import check_network

    path, changed = cached_attention(tmp_path / "decoder.onnx"), tmp_path / "changed.onnx"
    model = ir.load(path)
    edit(model.graph)
    ir.save(model, changed)
    graph, parsed = (ir.load(path), changed) if "cache" in message else (model, path)
    log = builder._Log()
    listener = log.listener(rtx)
    maker = rtx.module.Builder(listener)
    network, parser = builder._parsed(rtx, maker, listener, graph, parsed)
    with pytest.raises(TargetError, match=message):
        check_network(rtx, network, graph, path)
    del parser


def test_sizes_that_a_profile_does_not_name(rtx, tmp_path):
    path = linear(tmp_path / "linear.onnx")
    with pytest.raises(TargetError, match=r"profile 0 \(any\) has no sizes for the dynamic input 'x'"):
        compile_engine(rtx, path, profiles=[profile()], sm=[86])
    upside = profile(x=ShapeRange(min=(8, 64), opt=(4, 64), max=(1, 64)))
    with pytest.raises((TargetError, ValueError, RuntimeError)):
        compile_engine(rtx, path, profiles=[upside], sm=[86])


def test_a_graph_that_does_not_compile_says_why(rtx, tmp_path):
    """8-bit floating point on a GPU without it: the parser takes it, the builder does not."""
    weight = helper.make_tensor("codes", TensorProto.FLOAT8E4M3FN, [64, 64], bytes(64 * 64), raw=True)
    scale = helper.make_tensor("scale", HALF, [], np.float16(0.1).tobytes(), raw=True)
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["weight"], name="weights"),
        helper.make_node("MatMul", ["x", "weight"], ["y"], name="product"),
    ]
    path = save(tmp_path / "fp8.onnx", nodes, [value("x", ["rows", 64])], [value("y", ["rows", 64])])
    import onnx

    model = onnx.load(path)
    model.graph.initializer.extend([weight, scale])
    onnx.save(model, path)
    assert compile_engine(rtx, path, profiles=[rows()], sm=[89]).data.nbytes
    with pytest.raises(TargetError, match=r"tensorrt-rtx 1\.\S+ does not compile .*fp8\.onnx: .*(FP8|Fp8|fp8|DataType)"):
        compile_engine(rtx, path, profiles=[rows()], sm=[86])


def test_progress_rises_to_the_end(rtx, tmp_path):
    seen = Remembered()
    seen.start("engine linear", 1.0)
    compile_engine(rtx, linear(tmp_path / "linear.onnx"), profiles=[rows()], sm=[86], progress=seen, step="engine linear")
    assert seen.totals["engine linear"] == pytest.approx(1.0)


def test_fractions_of_phases_within_phases():
    watched = BuildProgress()
    watched.began("build", None, 4)
    assert watched.stepped("build", 0) and watched.fraction == 0.25
    watched.began("timing", "build", 2)
    watched.stepped("timing", 0)
    assert watched.fraction == pytest.approx(0.375)
    watched.ended("timing")
    watched.stepped("unheard of", 3)
    watched.began("timing", "build", 2)
    watched.stepped("timing", 0)
    assert watched.fraction == pytest.approx(0.375), "a phase that runs again takes nothing back"
    watched.stepped("build", 3)
    assert watched.fraction == 1.0


def test_cancelling_stops_tensorrt(rtx, tmp_path, monkeypatch):
    """What Ctrl-C does, at TensorRT's first step: it stops by itself, and the interrupt is what is raised."""
    seen = Remembered()
    seen.start("engine", 1.0)
    entered = threading.Event()
    real = BuildProgress.stepped

    def stepped(self, name, step):
        entered.set()
        while not self.cancelled:
            threading.Event().wait(0.01)
        return real(self, name, step)

    def interrupted(work, watched, progress, step):
        def then_stop(step, amount=1.0):
            raise AssertionError("nothing has happened yet")

        joined = threading.Thread.join

        def join(self, timeout=None):
            if entered.is_set() and not watched.cancelled:
                raise KeyboardInterrupt
            joined(self, timeout)

        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "join", join)
            return run_watched(work, watched, progress, step)

    monkeypatch.setattr(BuildProgress, "stepped", stepped)
    monkeypatch.setattr(builder, "run_watched", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compile_engine(rtx, linear(tmp_path / "linear.onnx"), profiles=[rows()], sm=[86], progress=seen, step="engine")


def test_an_error_in_the_thread_is_raised_here():
    def work():
        raise TargetError("out of memory")

    seen = Remembered()
    seen.start("engine", 1.0)
    with pytest.raises(TargetError, match="out of memory"):
        run_watched(work, BuildProgress(), seen, "engine")


def test_workspace_is_capped(rtx):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = rtx.module.Builder(rtx.module.Logger()).create_builder_config()
        seam.set_workspace(rtx, config, 1 << 20)
        assert config.get_memory_pool_limit(rtx.module.MemoryPoolType.WORKSPACE) == 1 << 20


def test_float32_is_not_tf32(rtx):
    config = rtx.module.Builder(rtx.module.Logger()).create_builder_config()
    assert config.get_flag(rtx.module.BuilderFlag.TF32)
    seam.keep_float32(rtx, config)
    assert not config.get_flag(rtx.module.BuilderFlag.TF32)
