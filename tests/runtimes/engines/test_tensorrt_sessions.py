"""Whole sessions on the TensorRT engine over stand-ins of GPU and TensorRT: the tokens of the portable graphs on the CPU.

The graphs are those of TensorRT builds in fp32 (cache updated in place; TensorRT 10.3's operators and two sets of caches).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from host_device import HostDevice
from host_engine import HostRuntime, engine_entry, graph_entry, target_device
from host_kernels import HostKernels
from PIL import Image

from vlm_edge.targets.precision import bundle_roles
from vlm_edge.targets.tensorrt.pipeline import lower_exactly
from vlm_edge_runtime import VisionLanguageModel, load
from vlm_edge_runtime.bundle.manifest import Build, GraphEntry
from vlm_edge_runtime.bundle.reader import Bundle, open_bundle
from vlm_edge_runtime.engines.tensorrt import TensorRTEngine
from vlm_edge_runtime.errors import OptionError

BUCKETS = (64, 256)
CASES = {
    "tiny-llava": "What is in the picture?",
    "blip-caption": "a photo of",
    "git": "a photo of",
    "show_attend_tell": "",
}
"""Features among tokens; cross-attention; a prefix that sees itself; a recurrent state and no cache."""


@pytest.fixture(scope="module", name="kernels")
def _kernels(tmp_path_factory) -> HostKernels:
    return HostKernels(tmp_path_factory.mktemp("kernels"))


def _lowered(path: Path, folder: Path, native: bool) -> Bundle:
    """The bundle with a build whose engines are ONNX files."""
    shutil.copytree(path, folder)
    opened = open_bundle(folder)
    kinds = bundle_roles(opened.graphs)
    graphs: dict[str, GraphEntry] = {}
    (folder / "builds" / "host").mkdir(parents=True)
    most = min(max(BUCKETS), opened.manifest.contract.context_length)  # type: ignore[union-attr]
    for role in opened.graphs:
        cached = role == "decoder" and opened.kv is not None and opened.kv.layers > 0
        for capacity in sorted({min(size, most) for size in BUCKETS}) if cached else [None]:
            model = ir.load(opened.graph_path(role))
            lower_exactly(model, kinds[role], target_device(native), capacity=capacity)
            name = f"{role}.c{capacity}" if capacity else role
            graphs[name] = graph_entry(folder, f"builds/host/{name}.onnx", role, model)
    engines = [engine_entry(name, entry) for name, entry in graphs.items()]
    build = Build(name="host", target="host", backend="tensorrt", precision={}, graphs=graphs, engines=engines, kv=opened.kv)
    return Bundle(folder, opened.manifest, build, opened.graphs | graphs)


@pytest.fixture(name="sessions")
def _sessions(portable_bundle, tmp_path, kernels) -> Callable[..., tuple[VisionLanguageModel, VisionLanguageModel]]:
    """`sessions(name, native)` → the TensorRT engine's session, and the portable graphs' on the CPU."""

    def make(name: str, native: bool) -> tuple[VisionLanguageModel, VisionLanguageModel]:
        path = portable_bundle(name)
        bundle = _lowered(path, tmp_path / f"{name}.vlm", native)
        engine = TensorRTEngine(bundle, HostDevice(kernels, tmp_path), HostRuntime(native))
        reference = load(path, build="portable")
        assert isinstance(reference, VisionLanguageModel)
        return VisionLanguageModel(bundle, engine), reference

    return make


def _pictures() -> list[Image.Image]:
    random = np.random.default_rng(3)
    return [Image.fromarray(random.integers(0, 256, (48, 48, 3), np.uint8)) for _ in range(3)]


@pytest.mark.parametrize("native", [True, False], ids=["in place", "two sets"])
@pytest.mark.parametrize("name", CASES)
def test_sessions_on_stand_ins_say_what_the_portable_graphs_say(sessions, name, native) -> None:
    mine, reference = sessions(name, native)
    prompt, pictures = CASES[name], _pictures()
    for options in ({}, {"temperature": 0.9, "top_k": 12, "top_p": 0.95, "seed": 5, "repetition_penalty": 1.2}):
        found = [one.generate(prompt, images=[pictures[0]], max_new_tokens=12, **options) for one in (mine, reference)]
        assert found[0].tokens == found[1].tokens and len(found[0].tokens) > 1
    rows = [one.generate([prompt] * 2, images=[[pictures[1]], [pictures[2]]], max_new_tokens=8) for one in (mine, reference)]
    assert [row.tokens for row in rows[0]] == [row.tokens for row in rows[1]]
    beams = [one.generate(prompt, images=[pictures[0]], max_new_tokens=6, num_beams=3) for one in (mine, reference)]
    assert beams[0].tokens == beams[1].tokens
    counts = mine._engine.step_counts  # type: ignore[attr-defined]
    assert counts.captured > 0 and counts.host_sampled == 0
    mine.close()
    reference.close()


def test_a_conversation_moves_to_a_larger_cache(sessions) -> None:
    mine, reference = sessions("tiny-llava", True)
    picture = _pictures()[0]
    assert mine.context_length == reference.context_length or mine.context_length == max(BUCKETS)
    with pytest.raises(OptionError, match="context_length=100000 is out of range"):
        VisionLanguageModel(mine._bundle, mine._engine, context_length=100_000)
    texts = ["What is in the picture?", "What is in the picture? " + "And what else is there? " * 4]
    for text in texts:
        for one in (mine, reference):
            one.clear_caches() if one is reference else None
        found = [one.generate(text, images=[picture], max_new_tokens=6) for one in (mine, reference)]
        assert found[0].tokens == found[1].tokens
    assert mine.stats.reused_tokens > 0
    loaded = list(mine._engine._runtime.loaded)  # type: ignore[attr-defined]
    assert len([name for name in loaded if name.startswith("decoder.c")]) == 2, loaded
