"""The ways from media to words once more, lowered for the CPU: the C loop says what the reference says."""

from __future__ import annotations

import pytest
from by_hand import SHORT, WORDS
from flow_bundles import START, contract, cross_kv, encoder, image, vision, write
from session_pictures import noise
from toy_decoder import Toy

from vlm_edge.targets import load_target
from vlm_edge.targets.build import build
from vlm_edge_runtime import load
from vlm_edge_runtime.bundle.manifest import Memory, PromptFormat, TokenInput

STARTED = PromptFormat(start_tokens=[START])


def memory(source: str) -> Memory:
    return Memory(source=source, mask="source", hidden_size=32)


def flows():
    crossed = Toy(cross=True, rotary=True)
    yield "features", crossed, {"cross_kv": cross_kv(crossed)}, {"memory": memory("features")}, image("memory"), WORDS
    encoded = {"encoder": encoder(), "cross_kv": cross_kv(crossed)}
    yield "encoder", crossed, encoded, {"memory": memory("encoder"), "prompt": STARTED}, image(), WORDS
    blocks = [TokenInput(name="block_ids", kind="blocks")]
    yield "blocks", Toy(blocks=True, rotary=True), {}, {"token_inputs": blocks}, image(), f"{WORDS} <image> b"
    beside = [TokenInput(name="deepstack.0", kind="features")]
    deep = {"vision_encoder": vision(deepstack=True)}
    yield "deepstack", Toy(feature=True, rotary=True), deep, {"token_inputs": beside}, image(), f"{WORDS} <image> b"
    state = Toy(cross=True, recurrent=True, cached=False, axes=0)
    graphs = {"cross_kv": cross_kv(state, states=True)}
    yield "recurrent", state, graphs, {"memory": memory("features"), "prompt": STARTED}, image("memory"), WORDS


@pytest.mark.parametrize("flow", list(flows()), ids=lambda flow: flow[0])
def test_the_build_answers_as_the_portable_graphs(flow, tmp_path) -> None:
    _, toy, graphs, options, modality, prompt = flow
    made = contract(toy, modality, **options)
    path = write(tmp_path / "toy.vlm", toy, {"vision_encoder": vision(), **graphs}, made)
    build(path, load_target("cpu-fp32"))
    with load(path, build="portable") as reference, load(path, build="cpu-fp32") as vlm:
        expected = reference.generate(prompt, images=noise(1), **SHORT)
        for _ in range(2):
            assert vlm.generate(prompt, images=noise(1), **SHORT).tokens == expected.tokens
        assert vlm.stats.reused_tokens == (0 if not toy.cached else vlm.stats.prompt_tokens - 1)
        prompts, images = [prompt, prompt, prompt], [noise(2), noise(1), noise(3)]
        rows = [row.tokens for row in vlm.generate(prompts, images=images, **SHORT)]
        assert rows == [row.tokens for row in reference.generate(prompts, images=images, **SHORT)]
        assert rows[1] == expected.tokens
