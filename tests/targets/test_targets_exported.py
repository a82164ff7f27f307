"""Every kind of exported checkpoint, built for every target; and static int8 from pictures."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

import onnx_ir as ir
import tiny
from PIL import Image

from vlm_edge.export import export
from vlm_edge.targets.build import build
from vlm_edge_runtime.bundle.reader import open_bundle

DECODERS = [name for name in tiny.CHECKPOINTS if name not in ("clip", "siglip")]


@pytest.fixture(scope="module")
def portable(tmp_path_factory):
    """One export per checkpoint, shared by the tests of this file (their builds have names of their own)."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            export(tiny.checkpoint(name, folder / "checkpoint"), folder / "bundle.vlm", check=False)
            made[name] = folder / "bundle.vlm"
        return made[name]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.CHECKPOINTS)
def test_full_precision(portable, name):
    """fp32 lowering changes nothing but the order of additions (build() itself compares and refuses otherwise)."""
    made = build(portable(name), "cpu-fp32")
    relative = {role: made.options[f"{role}.relative"] for role in made.graphs}
    assert relative and max(relative.values()) <= 1e-4
    if name in DECODERS:
        graph = ir.load(open_bundle(portable(name), build="cpu-fp32").graph_path("decoder")).graph
        operators = [node.op_type for node in graph]
        assert operators.count("GroupQueryAttention") == tiny.LAYERS and "Attention" not in operators
        assert "Transpose" not in operators, "heads are never rearranged"


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.CHECKPOINTS)
@pytest.mark.parametrize("target", ["cpu-int8", "cpu-int4"])
def test_quantised(portable, name, target):
    made = build(portable(name), target)
    assert set(made.graphs) == set(open_bundle(portable(name)).graphs), "every graph is quantised"
    if name in DECODERS:
        graph = ir.load(open_bundle(portable(name), build=target).graph_path("decoder")).graph
        assert not [node for node in graph if node.op_type in ("MatMul", "Gemm")], "no weight is left in fp32"


def pictures(folder: Path) -> list[Path]:
    """A few pictures with structure at several scales."""
    random = np.random.default_rng(0)
    files = []
    for index, size in enumerate((16, 40, 64)):
        coarse = random.integers(0, 255, (size // 4, size // 3, 3), np.uint8)
        files.append(folder / f"{index}.png")
        Image.fromarray(coarse).resize((size * 2, size), Image.Resampling.BICUBIC).save(files[-1])
    return files


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("smolvlm", "qwen2_vl", "llava-llama")]


@pytest.mark.parametrize("name", ["clip", *SLOW])
def test_static_int8_from_pictures(portable, name, tmp_path):
    made = build(portable(name), "cpu-int8", calibration=pictures(tmp_path), name="static")
    assert made.options["calibration_images"] == 3
    operators = [node.op_type for node in ir.load(open_bundle(portable(name), build="static").graph_path("vision_encoder")).graph]
    assert "QuantizeLinear" in operators and "DynamicQuantizeLinear" not in operators
    assert np.isfinite(made.options["vision_encoder.cosine"])
