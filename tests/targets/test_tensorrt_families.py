"""Engines of real models for RTX 30, 40 and 50: the trained ones, and one of every family. TensorRT has nothing to remark."""

import shutil
import sys

import pytest
from engine_builds import SMS, Remembered, stand_in_tensorrt

from vlm_edge.targets.backend import CompileOptions
from vlm_edge.targets.build import build
from vlm_edge.targets.tensorrt import backend
from vlm_edge.targets.tensorrt.seam import Gpu
from vlm_edge_runtime.bundle.manifest import GenerativeContract
from vlm_edge_runtime.bundle.reader import open_bundle, read_manifest

THREE = CompileOptions(sm=SMS, context=(64,))
FAMILIES = {
    "qformer": "blip2-opt",
    "cross_attention": "blip-caption",
    "gated_cross_attention": "idefics",
    "prefix_lm": "git",
    "early_fusion": "chameleon",
    "projector, patches in rows": "qwen2_vl",
}


def compiled(source, folder, target="rtx-40", options=THREE):
    """The bundle built for the target, with what was said of each engine."""
    path = shutil.copytree(source, folder / source.name)
    seen = Remembered()
    made = build(path, target, compiling=options, progress=seen)
    return path, made, seen.engines()


def check(path, made, told):
    manifest = read_manifest(path)
    roles = {one.role for one in made.engines}
    assert roles == set(manifest.graphs), "every graph has an engine"
    assert not [detail for detail in told.values() if "remark" in detail], f"TensorRT remarks something: {told}"
    for engine in made.engines:
        assert engine.sm == list(SMS)
    contract = manifest.contract
    if isinstance(contract, GenerativeContract):
        (decoder,) = (one for one in made.engines if one.role == "decoder")
        assert decoder.capacity == 64 and decoder.graph == "decoder.c64"
        expected = {
            f"present.{layer}.{part}": f"past_key_values.{layer}.{part}"
            for layer in range(contract.kv.layers)
            for part in ("key", "value")
        }
        assert decoder.aliases == expected, "every cache is updated in place"
    open_bundle(path, build=made.name)


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-clip"])
def test_trained_models(name, portable_bundle, tmp_path):
    check(*compiled(portable_bundle(name), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-smolvlm", *FAMILIES.values()])
def test_a_model_of_each_family(name, portable_bundle, tmp_path):
    check(*compiled(portable_bundle(name), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("target,version", [("jetson-orin-nano-jp62", "10.3.0.30"), ("jetson-orin-nano", "10.16.1.11")])
def test_jetson_graphs_with_a_stand_in_tensorrt(target, version, portable_bundle, tmp_path, monkeypatch):
    """What a Jetson compiles, 4-bit decoder and one row at a time, through the builder that can be had."""
    monkeypatch.setattr(backend, "local_gpu", lambda: Gpu("Orin", 87))
    monkeypatch.setattr("vlm_edge.targets.tensorrt.engines.has_timing_cache", lambda library: False)
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in_tensorrt(version))
    _, made, told = compiled(portable_bundle("tiny-llava"), tmp_path, target, CompileOptions(context=(64,)))
    assert len(made.engines) == 4 and not [detail for detail in told.values() if "remark" in detail]
    decoder = next(one for one in made.engines if one.role == "decoder")
    assert bool(decoder.aliases) == (target == "jetson-orin-nano"), "TensorRT 10.3 has no cache update"
    assert [one.shapes["inputs_embeds"].max[:2] for one in decoder.profiles] == [(2, 1), (2, 64)]
