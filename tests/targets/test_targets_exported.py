"""Every kind of exported checkpoint, built for every target; and static int8 from pictures."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

import onnx_ir as ir
import tiny
from graph_targets import graph_target
from PIL import Image

from vlm_edge.families import coverage
from vlm_edge.passes.graph import is_weight
from vlm_edge.targets.build import build
from vlm_edge.targets.precision import bundle_roles
from vlm_edge_runtime.bundle.manifest import GenerativeContract, SequentialPositions
from vlm_edge_runtime.bundle.reader import Bundle, open_bundle

FAST = ("llava-llama", "paligemma2", "florence2", "idefics", "clip")
"""Causal, blocks, an encoder before the decoder, images seen token by token; the rest of the families in the slow run."""
COVERED = {one.checkpoint for one in coverage.systems()} - set(FAST)
"""Built and compared with PyTorch in tests/coverage already."""
VARIANTS = [name for name in tiny.CHECKPOINTS if name not in COVERED]
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]


@pytest.fixture
def bundle(portable_bundle: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the checkpoint's portable bundle, to build in."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(portable_bundle(name), tmp_path / f"{name}.vlm"))

    return make


def operators(graph: ir.Graph) -> list[str]:
    """Of a graph and of the branches in it."""
    return [node.op_type for node in graph.all_nodes()]


def decoder(opened: Bundle) -> ir.Graph:
    return ir.load(opened.graph_path("decoder")).graph


@pytest.mark.parametrize("name", NAMES)
def test_full_precision(bundle, name):
    """fp32 lowering changes nothing but the order of additions (build() itself compares and refuses otherwise)."""
    path = bundle(name)
    made = build(path, graph_target("cpu-fp32"))
    relative = {role: made.options[f"{role}.relative"] for role in made.graphs}
    assert relative and max(relative.values()) <= 1e-4
    contract = open_bundle(path).manifest.contract
    if not isinstance(contract, GenerativeContract):
        return
    cached = sum(node.op_type == "Attention" and len(node.inputs) > 5 for node in decoder(open_bundle(path)))
    assert cached == contract.kv.layers, "every cached layer of the portable decoder is one Attention"
    assert made.kv.shared_buffer, "nothing grows: the C loop runs it"
    lowered = decoder(open_bundle(path, build="cpu-fp32"))
    assert operators(lowered).count("GroupQueryAttention") == cached
    outside = [node.op_type for node in lowered]
    assert "Attention" not in outside, "only the branch of a step with blocks has one"
    if contract.memory is None and isinstance(contract.positions, SequentialPositions):
        assert "Transpose" not in outside, "heads are never rearranged"


@pytest.mark.parametrize("name", NAMES)
def test_four_bits(bundle, name):
    quantised(bundle(name), "cpu-int4")


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_eight_bits(bundle, name):
    quantised(bundle(name), "cpu-int8")


def quantised(path: Path, target: str) -> None:
    made, portable = build(path, graph_target(target)), open_bundle(path)
    kinds = bundle_roles(portable.graphs)
    assert all(np.isfinite(made.options[f"{role}.cosine"]) for role in made.graphs)
    for role in portable.graphs:
        if kinds[role] == "codes":
            assert role not in made.graphs or made.graphs[role].precision == "fp32"
            continue
        graph = ir.load(open_bundle(path, build=target).graph_path(role)).graph
        left = [node for node in graph if node.op_type in ("MatMul", "Gemm") and is_weight(node.inputs[1])]
        assert not left, f"a weight of {role} is left in fp32"


def pictures(folder: Path) -> list[Path]:
    """A few pictures with structure at several scales."""
    random = np.random.default_rng(0)
    files = []
    for index, size in enumerate((16, 40, 64)):
        coarse = random.integers(0, 255, (size // 4, size // 3, 3), np.uint8)
        files.append(folder / f"{index}.png")
        Image.fromarray(coarse).resize((size * 2, size), Image.Resampling.BICUBIC).save(files[-1])
    return files


SLOW = (
    "smolvlm",
    "qwen2_vl",
    "qwen2_5_vl",
    "llava-llama",
    "blip2-opt",
    "instructblip-llama",
    "mllama",
    "pix2struct",
    "chameleon",
)


@pytest.mark.parametrize("name", ["clip", "idefics", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_static_int8_from_pictures(bundle, name, tmp_path):
    """Through every graph that an image passes: the later ones are calibrated on what the earlier ones give."""
    path = bundle(name)
    made = build(path, graph_target("cpu-int8"), calibration=pictures(tmp_path), name="static")
    assert made.options["calibration_images"] == 3
    opened = open_bundle(path, build="static")
    contract = opened.manifest.contract
    modalities = contract.modalities if isinstance(contract, GenerativeContract) else []
    for role in [role for one in modalities if one.kind == "image" for role in one.graphs] or ["vision_encoder"]:
        if role in made.graphs and made.graphs[role].precision == "int8":
            found = operators(ir.load(opened.graph_path(role)).graph)
            assert "QuantizeLinear" in found and "DynamicQuantizeLinear" not in found
            assert np.isfinite(made.options[f"{role}.cosine"])
