"""The head in two planes: greedy decoding chooses what the whole head would, and everything else has the whole head's bits."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from vlm_edge.targets.build import build
from vlm_edge.targets.native import compile as compiling
from vlm_edge.targets.native.head import TWO_PLANES, planes, read_as, split
from vlm_edge.targets.native.panels import Quantised, quantised
from vlm_edge.targets.native.plan_file import Buffer, BufferKind, Format, Kind, Ref, Weight, write
from vlm_edge.targets.pipeline import lower_decoder
from vlm_edge_runtime import _native
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.engines import SamplingParams
from vlm_edge_runtime.engines.native_ort import NativeDecoder, NativeGraph
from vlm_edge_runtime.engines.ort_library import ensure_runtime
from vlm_edge_runtime.errors import DeviceError

GREEDY = SamplingParams()
NAMES = ("tiny-llava", "tiny-smolvlm")


def ties(weight: Weight) -> Weight:
    """The same scales, and codes whose upper halves are those of the first panel in every panel: the lower ones decide."""

    def make():
        data = np.array(weight.make()).view(np.uint8)
        line = np.ones(data.shape[1], bool)
        blocks, pair = -(-weight.depth // 32), 2 * weight.block // 32
        for number in range(-(-blocks // pair)):
            line[number * (64 + pair * 512) :][:64] = False
        data[:, line] = (data[:1, line] & 0xF0) | np.random.default_rng(5).integers(0, 16, data[:, line].shape, np.uint8)
        data[:, ~line] = data[:1, ~line]
        return data

    return replace(weight, make=make)


@pytest.fixture(scope="module")
def plans(portable_bundle, tmp_path_factory) -> dict[str, Path]:
    """Plans of each model, `…-whole` and `…-planes`; of the first also with a head whose upper halves are all alike."""
    folder, found = tmp_path_factory.mktemp("planes"), {}
    with pytest.MonkeyPatch.context() as patch:
        for name, kind in (*((one, "") for one in NAMES), (NAMES[0], "ties-")):
            for form in ("whole", "planes"):

                def stored(made, step, form=form, kind=kind):
                    if kind:
                        step.weights[0] = ties(step.weights[0])
                    return form == "planes" and split(made, step)

                patch.setattr(compiling, "split", stored)
                bundle = open_bundle(portable_bundle(name))
                model = ir.load(bundle.graph_path("decoder"))
                context = bundle.manifest.contract.context_length
                lower_decoder(model, precision="int4", head="int8", context_length=context, branches=False)
                key = f"{name}-{kind}{form}"
                found[key] = folder / f"{key}.plan"
                plan = compiling.Compiler(model).compile()
                assert (read_as(plan) == TWO_PLANES) == (form == "planes")
                write(plan, found[key])
    return found


def opened(plans, portable_bundle, key: str, threads: int = 2, kernels: str | None = None) -> NativeDecoder:
    ensure_runtime()
    name = key.removesuffix("-whole").removesuffix("-planes").removesuffix("-ties")
    plan = _native.Session(str(plans[key]), "decoder", threads=threads, spin=False, plan=True, kernels=kernels)
    embed = _native.Session(str(open_bundle(portable_bundle(name)).graph_path("embed_tokens")), "embed_tokens")
    times: dict[str, deque[float]] = {"decoder": deque(), "embed_tokens": deque()}
    return NativeDecoder(NativeGraph(plan, lambda _: None), NativeGraph(embed, lambda _: None), times)


def filled(decoder: NativeDecoder, rows: int, params: SamplingParams = GREEDY, seed: int = 0):
    state = decoder.allocate(rows, 200)
    for row in range(rows):
        generator = np.random.default_rng(seed * 1000 + row)
        embeds = generator.standard_normal((5 + row, decoder.hidden_size), np.float32) * np.float32(generator.uniform(0.02, 2))
        state.prefill(row, embeds, np.arange(5 + row))
        state.start(row, params, np.zeros(0, np.int64), 5 + row)
    return state


def pictures(graph: NativeGraph, generator) -> dict[str, np.ndarray]:
    """Pictures of 5 tokens that every token attends to."""
    specs = [one for one in graph.inputs if one.name.startswith("cross_key_values.")]
    found = {one.name: generator.standard_normal((one.shape[1], 5, one.shape[3])).astype(np.float32) for one in specs}
    return found | {"encoder_attention_mask": np.ones(5, np.int64)}


def tokens_of(rows) -> list[list[int]]:
    return [row.tokens for row in rows]


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize(("depth", "width"), [(64, 16), (70, 33), (576, 100)])
def test_planes_are_the_weight(block, depth, width):
    generator = np.random.default_rng(depth + block)
    groups = -(-depth // block)
    codes = generator.integers(0, 256, (width, groups, block), np.uint8)
    codes[3, 0] = 128
    scales = generator.standard_normal((width, groups)).astype(np.float32)
    whole = quantised(Quantised(8, block, depth, lambda: codes, lambda: scales), np.arange(width))
    upper, table, lower = planes(whole)
    assert upper.format == Format.INT4 and upper.scale == 16 * whole.scale
    high = quantised(Quantised(4, block, depth, lambda: packed(codes >> 4), lambda: scales), np.arange(width))
    got, wanted = upper.make(), np.array(high.make())
    line = scale_places(depth, block, wanted.shape[1])
    np.testing.assert_array_equal(got[:, ~line], wanted[:, ~line], "the upper halves are a matrix of 4 bits")
    lines = [np.ascontiguousarray(one[:, line]).view(np.uint16) for one in (got, wanted)]
    differ = (lines[0] != lines[1]).reshape(len(got), -1, 16)
    assert differ[0, 0, 3] and differ.sum() == 1, "of zeros alone the scale is 0"
    low = np.array(quantised(Quantised(4, block, depth, lambda: packed(codes & 15), lambda: scales), np.arange(width)).make())
    blocks = lower.make().reshape(len(got), -1)
    filling = width % 16 == 0 and depth % 32 == 0
    assert not filling or np.array_equal(blocks, low[:, ~line]), "and the lower ones lie in the same order"
    assert lower.size == blocks.nbytes and upper.size == got.nbytes and table.make().nbytes == table.size
    largest = np.abs(np.asarray(scales / whole.scale, np.float16).astype(np.float32) * whole.scale * 7.5) ** 2
    assert table.make()[0, 0] == pytest.approx(np.delete(largest[:16, 0], 3).max(), rel=1e-6)


def packed(halves):
    return halves[..., 0::2] | halves[..., 1::2] << 4


def scale_places(depth: int, block: int, size: int):
    line, pair = np.zeros(size, bool), 2 * block // 32
    for number in range(-(-depth // (2 * block))):
        line[number * (64 + pair * 256) :][:64] = True
    return line


@pytest.mark.parametrize("key", [*NAMES, f"{NAMES[0]}-ties"])
def test_all_logits_have_the_bits_of_the_whole_head(plans, portable_bundle, key):
    for kernels in _native.kernels():
        pair = [opened(plans, portable_bundle, f"{key}-{form}", kernels=kernels) for form in ("whole", "planes")]
        found = []
        for decoder in pair:
            state = filled(decoder, 3)
            logits = [state.logits(row) for row in range(3)]  # of prompts
            chosen = tokens_of(state.decode(7))
            logits += [state.logits(row) for row in range(3)]  # what is made whole when it is asked for
            state.reorder([2, 0, 2])
            logits += [state.logits(row) for row in range(3)]
            logits += list(state.step(np.array([3, 4, 5])))
            found.append((chosen, logits))
        assert found[0][0] == found[1][0]
        for left, right in zip(found[0][1], found[1][1], strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("key", [*NAMES, f"{NAMES[0]}-ties"])
def test_greedy_tokens_are_the_largest_of_all_logits(plans, portable_bundle, key):
    decoder = opened(plans, portable_bundle, f"{key}-planes", threads=1)
    whole = opened(plans, portable_bundle, f"{key}-whole", threads=1)
    seen = set()
    for seed in range(40):
        states = [filled(one, 1, seed=seed) for one in (decoder, whole)]
        for _ in range(4):
            left, right = (tokens_of(state.decode(1))[0] for state in states)
            assert left == right
            assert left[0] == int(np.argmax(states[0].logits(0)))
            seen.add(left[0])
    assert len(seen) > 10, "not always the same token"


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_every_number_of_threads_and_rows_gives_the_same_tokens(plans, portable_bundle, rows):
    wanted = tokens_of(filled(opened(plans, portable_bundle, "tiny-llava-whole"), rows).decode(12))
    for threads in range(1, 9):
        decoder = opened(plans, portable_bundle, "tiny-llava-planes", threads=threads)
        assert tokens_of(filled(decoder, rows).decode(12)) == wanted


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.9, top_p=0.9, seed=3),
        SamplingParams(temperature=1.0, top_k=5, seed=4),
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(logprobs=4),
        SamplingParams(suppress_tokens=(5, 6, 7)),
    ],
    ids=lambda one: repr(one)[15:40],
)
def test_whatever_looks_at_other_logits_has_the_whole_heads(plans, portable_bundle, params):
    found = []
    for form in ("whole", "planes"):
        state = filled(opened(plans, portable_bundle, f"tiny-llava-{form}"), 3)
        said = [tokens_of(state.decode(5))]
        state.start(1, params, np.arange(3, 6), state.lengths[1])  # one row of three; then what was greedy goes on otherwise
        said.append([(row.tokens, row.logprobs, row.top_logprobs) for row in state.decode(5)])
        for row in range(3):
            state.start(row, params, np.arange(3, 6), state.lengths[row])
        said.append([(row.tokens, row.logprobs, row.top_logprobs) for row in state.decode(5)])
        found.append(said)
    assert found[0] == found[1]


def test_drafts_are_accepted_as_single_steps_choose(plans, portable_bundle):
    decoder = opened(plans, portable_bundle, "tiny-llava-planes")
    wanted = tokens_of(filled(decoder, 2).decode(9))
    state = filled(decoder, 2)
    first = tokens_of(state.decode(3))  # rough logits before a run of drafts
    assert first == [row[:3] for row in wanted]
    rows = state.verify([row[3:8] for row in wanted])
    assert tokens_of(rows) == [row[3:9] for row in wanted]
    whole = filled(opened(plans, portable_bundle, "tiny-llava-whole"), 2)
    whole.decode(9)
    np.testing.assert_array_equal(state.logits(1), whole.logits(1))


def test_a_plan_that_refines_anything_but_the_logits_is_refused(portable_bundle, tmp_path):
    bundle = open_bundle(portable_bundle(NAMES[0]))
    model = ir.load(bundle.graph_path("decoder"))
    context = bundle.manifest.contract.context_length
    lower_decoder(model, precision="int4", head="int8", context_length=context, branches=False)
    plan = compiling.Compiler(model).compile()
    step = next(step for step in plan.steps if step.kind == Kind.REFINE)
    step.outputs[0] = Ref(Buffer(BufferKind.FLOATS, step.width))
    write(plan, tmp_path / "damaged.plan")
    ensure_runtime()
    with pytest.raises(DeviceError, match="a step does not fit its buffers or weights"):
        _native.Session(str(tmp_path / "damaged.plan"), "decoder", threads=1, spin=False, plan=True)


@pytest.mark.parametrize("kernels", _native.kernels())
def test_a_head_with_a_table_of_further_tokens_beside_it(portable_bundle, tmp_path, kernels):
    """IDEFICS computes the logits of its added tokens by a product of their own: the larger one is split, both are complete."""
    ensure_runtime()
    bundle = open_bundle(portable_bundle("idefics"))
    found = []
    for form in ("whole", "planes"):
        model = ir.load(bundle.graph_path("decoder"))
        context = bundle.manifest.contract.context_length
        lower_decoder(model, precision="int4", head="int8", context_length=context, branches=False)
        with pytest.MonkeyPatch.context() as patch:
            if form == "whole":
                patch.setattr(compiling, "split", lambda made, step: False)
            plan = compiling.Compiler(model).compile()
        writers = [one for one in plan.steps if any(ref and ref.buffer.kind == BufferKind.LOGITS for ref in one.outputs)]
        logits = next(one for one in plan.outputs if one.name == "logits").shape[-1]
        assert [one.kind for one in writers] == [Kind.MATMUL, Kind.MATMUL] + [Kind.REFINE] * (form == "planes")
        assert writers[0].width + writers[1].width == logits and writers[-1].width == (max if form == "planes" else min)(
            writers[0].width, writers[1].width
        )
        write(plan, tmp_path / f"{form}.plan")
        session = _native.Session(str(tmp_path / f"{form}.plan"), "decoder", threads=2, spin=False, plan=True, kernels=kernels)
        embed = _native.Session(str(bundle.graph_path("embed_tokens")), "embed_tokens")
        graphs = NativeGraph(session, lambda _: None), NativeGraph(embed, lambda _: None)
        decoder = NativeDecoder(*graphs, {"decoder": deque(), "embed_tokens": deque()})
        state, generator, sees = decoder.allocate(2, 60), np.random.default_rng(3), np.ones(1, np.int64)
        for row in range(2):
            embeds = generator.standard_normal((6, decoder.hidden_size), np.float32)
            state.bind(row, pictures(graphs[0], generator))
            state.prefill(row, embeds, np.arange(6), {"cross_attention_mask": np.ones((6, 1), np.int64)})
            state.start(row, GREEDY, np.zeros(0, np.int64), 6, {"cross_attention_mask": sees})
        logits = [np.stack([state.logits(row) for row in range(2)])]
        for _ in range(9):
            said = tokens_of(state.decode(1))
            logits.append(np.stack([state.logits(row) for row in range(2)]))
            assert said == [[int(np.argmax(row))] for row in logits[-1]]
        found.append(logits)
    np.testing.assert_array_equal(*found)
    assert len({tuple(np.argmax(step, axis=-1)) for step in found[0]}) > 1


def test_the_build_says_how_its_head_is_read(portable_bundle, tmp_path):
    import shutil

    path = tmp_path / "tiny.vlm"
    shutil.copytree(portable_bundle("tiny-llava"), path)
    build(path, "cpu-int4")
    built = open_bundle(path, build="cpu-int4").build
    assert built.options["decoder.head"] == TWO_PLANES
    assert 0.5 * built.graphs["decoder"].model.bytes < built.options["decoder.token_bytes"] < built.graphs["decoder"].model.bytes
