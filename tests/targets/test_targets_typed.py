"""Typed and quantised graphs of the trained checkpoints: what they compute, and that TensorRT-RTX takes them as they are."""

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import Sketch

from vlm_edge.passes.cleanup import Cleanup
from vlm_edge.passes.gemm import GemmToMatMul
from vlm_edge.passes.half_twin import half_twin
from vlm_edge.passes.strong_types import Islands
from vlm_edge.quantize.qdq_fold import FoldWeights
from vlm_edge.targets import load_target
from vlm_edge.targets.prompts import decoder_feeds
from vlm_edge.targets.samples import Samples, modality_feeds, run_graph, session
from vlm_edge.targets.steps import STEPS, static_cache_feeds
from vlm_edge.targets.target import Options
from vlm_edge.targets.tensorrt.builder import compile_engine
from vlm_edge.targets.tensorrt.pipeline import decoder_thresholds, lower
from vlm_edge.targets.tensorrt.seam import load_library
from vlm_edge.targets.typed import apply_types
from vlm_edge_runtime.bundle.engine_profile import EngineProfile, ShapeRange
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.errors import TargetError

CAPACITY = 40
OLDEST = {"fp8": 89, "fp8w": 89, "nvfp4": 120}
"""The first compute capability that has a number format; the others run on SM 8.6 too."""
VISION = {
    "fp16": 0.99999,
    "bf16": 0.9999,
    "int8": 0.999,
    "int8w": 0.9999,
    "int4": 0.99,
    "fp8": 0.998,
    "fp8w": 0.999,
    "nvfp4": 0.99,
}
"""Least cosine of a trained vision encoder's output to the portable graph's, on a picture that was not calibrated on."""
DECODER = {"fp16": 0.99999, "int8": 0.998, "int8w": 0.999, "int4": 0.98, "fp8": 0.998, "nvfp4": 0.98}
"""The same of the logits, over prefill and decode steps on random numbers; of int8 over answers that it was not calibrated on,

since its activations are clipped to what the model really computes.
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Drawn scenes: all but the last are for calibration."""
    from benchmarks.train import scenes

    folder = tmp_path_factory.mktemp("scenes")
    for index, example in enumerate(scenes.held_out_examples(5, seed=11)):
        example.image.save(folder / f"{index}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def rtx():
    pytest.importorskip("tensorrt_rtx")
    return load_library(load_target("rtx-50"), (120,), gpu=None)


def cosine(left, right) -> float:
    left, right = left.astype(np.float64).ravel(), right.astype(np.float64).ravel()
    assert np.isfinite(left).all()
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


def twin_session(model):
    """What a GPU would compute, run on the CPU: quantised weights as numbers, each result rounded."""
    plain = model.clone()
    FoldWeights().apply(plain)
    with tempfile.TemporaryDirectory() as folder:
        ir.save(half_twin(plain), Path(folder) / "twin.onnx", external_data="twin.data")
        return session(Path(folder) / "twin.onnx")


def warnings_of(model, rtx) -> list[str]:
    """What TensorRT-RTX's parser says of a typed graph."""
    trt, said = rtx.module, []

    class Listener(trt.ILogger):
        def log(self, severity, message):
            if severity <= trt.ILogger.WARNING:
                said.append(message)

    listener = Listener()
    builder = trt.Builder(listener)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, listener)
    assert parser.parse(ir.to_proto(model).SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    return said


def pairs(names, words, quick):
    """Every model in every precision; those that show nothing new are slow."""
    first, *others = names
    found = [(first, word) for word in words]
    slow = pytest.mark.slow
    return found + [pytest.param(name, word, marks=[] if word in quick else [slow]) for name in others for word in words]


@pytest.mark.parametrize("name,word", pairs(["tiny-llava", "tiny-clip", "tiny-smolvlm"], VISION, quick=()))
def test_vision_of_the_trained_models(name, word, portable_bundle, pictures, rtx):
    bundle = open_bundle(portable_bundle(name))
    role = "vision_encoder"
    *seen, fresh = pictures
    low = lower(
        bundle,
        role,
        "encoder",
        {role: word},
        load_target("rtx-50"),
        calibration=(lambda: modality_feeds(bundle, role, seen)) if word in ("int8", "fp8") else None,
    )
    feeds = next(iter(modality_feeds(bundle, role, [fresh])))
    wanted, found = run_graph(session(bundle.graph_path(role)), feeds), run_graph(twin_session(low.model), feeds)
    for output, array in wanted.items():
        assert VISION[word] < cosine(found[output], array) < 1, output
    assert warnings_of(low.model, rtx) == []


@pytest.mark.parametrize("target", ["rtx-50", "jetson-orin-nano-jp62"], ids=["native", "legacy"])
@pytest.mark.parametrize("name,word", pairs(["tiny-llava", "tiny-smolvlm"], DECODER, quick=()))
def test_decoders_of_the_trained_models(name, word, target, portable_bundle, rtx):
    bundle, chosen = open_bundle(portable_bundle(name)), load_target(target)
    if target != "rtx-50" and word in OLDEST:
        pytest.skip("Orin has no such number format")
    words = {"decoder": word, "lm_head": "int8" if word == "int4" else "fp8" if word == "nvfp4" else word}
    thresholds, samples = None, Samples(bundle)
    steps = [samples.decoder(sequence=new, past=past, rows=rows, padding=pad, seed=new) for rows, new, past, pad in STEPS]
    if word == "int8":
        *answers, one, two = decoder_feeds(bundle, [])
        thresholds, steps = decoder_thresholds(bundle, "decoder", chosen, answers), [one, two]
    capacity = max(CAPACITY, *(step["inputs_embeds"].shape[1] for step in steps))
    model = lower(bundle, "decoder", "decoder", words, chosen, capacity=capacity, thresholds=thresholds).model
    reference, graph = session(bundle.graph_path("decoder")), twin_session(model)
    for step in steps:
        wanted = run_graph(reference, step)["logits"][:, -1:]
        found = run_graph(graph, static_cache_feeds(step, capacity=capacity))["logits"]
        assert DECODER[word] < cosine(found, wanted) < 1, step["inputs_embeds"].shape
    kinds = {value.name: value.dtype for value in [*model.graph.inputs, *model.graph.outputs]}
    assert kinds["logits"] == ir.DataType.FLOAT and kinds["past_lengths"] == ir.DataType.INT32
    assert kinds["inputs_embeds"] == kinds["past_key_values.0.key"] == kinds["present.3.value"] == ir.DataType.FLOAT16
    if target == "rtx-50":
        assert warnings_of(model, rtx) == []


def block(scale=1.0):
    """A linear layer (its weights times `scale`), a norm, a convolution and another linear layer."""
    random = np.random.default_rng(0)
    sketch = Sketch()
    dims = ["rows", 64, 128]

    def weight(name, *sizes):
        return sketch.weight(name, (random.standard_normal(sizes) / 11).astype(np.float32))

    x = sketch.input("x", dims)
    first = (random.standard_normal((128, 128)) / 11 * scale).astype(np.float32)
    value = sketch.node("MatMul", [x, sketch.weight("first", first)], shape=dims, name="first")
    value = sketch.node("LayerNormalization", [value, weight("gain", 128), weight("shift", 128)], {"axis": -1}, shape=dims)
    value = sketch.node("Conv", [value, weight("kernel", 64, 64, 3)], {"pads": [1, 1]}, shape=dims, name="conv")
    sketch.output("y", sketch.node("MatMul", [value, weight("second", 128, 128)], shape=dims, name="second"))
    return sketch.model()


@pytest.mark.parametrize("word", list(VISION))
def test_engines(word, rtx, tmp_path):
    """The smallest graph of each kind compiles for every GPU that has its number format, without a remark."""
    model = block()
    feeds = [{"x": np.random.default_rng(1).standard_normal((1, 64, 128)).astype(np.float32)}]
    apply_types(model, word=word, calibration=lambda: feeds, islands=Islands())
    path = tmp_path / "block.onnx"
    ir.save(model, path)
    shape = ShapeRange(min=(1, 64, 128), opt=(1, 64, 128), max=(4, 64, 128))
    for sm in (86, 89, 120):
        compiling = {"profiles": [EngineProfile(shapes={"x": shape})], "sm": [sm]}
        if sm < OLDEST.get(word, 0):
            with pytest.raises(TargetError, match="does not compile"):
                compile_engine(rtx, path, **compiling)
        else:
            made = compile_engine(rtx, path, **compiling)
            assert made.warnings == [] and made.layers.compared > 4


def typed_block(scale=1.0, **options):
    model = block(scale)
    Cleanup().apply(model)
    GemmToMatMul().apply(model)
    return model, apply_types(model, **options)


def test_fp32_stays_as_it_is():
    model, changes = typed_block(word="fp32")
    assert not any(changes) and {value.dtype for node in model.graph for value in node.outputs} == {ir.DataType.FLOAT}


@pytest.mark.parametrize("word", ["int8", "fp8"])
def test_activations_without_anything_to_calibrate_on(word):
    with pytest.raises(TargetError, match=f"name some pictures to calibrate on, .* choose {word}w"):
        typed_block(word=word)


def test_unknown_precision():
    with pytest.raises(TargetError, match="'int3' is no precision of a TensorRT graph"):
        typed_block(word="int3")


def test_smoothing_is_an_option():
    feeds = [{"x": np.random.default_rng(1).standard_normal((1, 64, 128)).astype(np.float32)}]
    for smooth in (0.0, 0.5):
        _, changes = typed_block(word="int8", calibration=lambda: feeds, options=Options(smooth=smooth), islands=Islands())
        assert ("smooth_activations" in [change.name for change in changes]) == (smooth > 0)


def test_islands_are_tried_where_there_is_something_to_try_them_on():
    feeds = [{"x": np.random.default_rng(1).standard_normal((1, 64, 128)).astype(np.float32)}]
    model, changes = typed_block(word="fp16", calibration=lambda: feeds)
    said = next(change for change in changes if change.name == "islands").notes[0]
    assert said.startswith("in fp32: none. Relative difference to the untyped graph on 1 inputs with none: ")
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    assert norm.outputs[0].dtype == ir.DataType.FLOAT16
    careful, _ = typed_block(scale=5e4, word="fp16", calibration=lambda: feeds)
    assert next(node for node in careful.graph if node.name == "first").outputs[0].dtype == ir.DataType.FLOAT, "beyond fp16"
