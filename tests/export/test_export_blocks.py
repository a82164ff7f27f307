"""Block masks: the same as transformers' own for token types, and a wrong one is found while a model is exported."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
import pytest
import tiny
import torch
import transformers as t
from transformers.masking_utils import causal_mask_function, eager_mask, sliding_window_causal_mask_function

from vlm_edge.export.attention import IMPLEMENTATION, Mask, attention_implementation, attention_mask, blocks, recording
from vlm_edge.export.check import check
from vlm_edge.export.trace import trace
from vlm_edge.families.blocks import block_cases, block_input, sample
from vlm_edge.families.decoder import decoder_plan, probe
from vlm_edge_runtime.errors import ExportError

IDS = torch.tensor([[1, 1, 0, 2, 2, 2, 0], [0, 3, 3, 3, 3, 3, 3]])


def seen(ids: torch.Tensor, past: int, window: int | None, windowed: bool) -> torch.Tensor:
    """The rule in words, entry by entry: bool `[batch, queries, keys]`."""
    batch, queries = ids.shape
    found = torch.zeros(batch, queries, past + queries, dtype=torch.bool)
    for row in range(batch):
        for query in range(queries):
            for key in range(past + queries):
                near = window is None or key > past + query - window
                together = key >= past and ids[row, query] > 0 and ids[row, key - past] == ids[row, query]
                found[row, query, key] = (key <= past + query and near) or (together and (near or not windowed))
    return found


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize(("window", "windowed"), [(None, False), (3, False), (3, True)])
def test_mask(past, window, windowed):
    rule = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    padded = torch.ones(2, past + IDS.shape[1], dtype=torch.bool)
    padded[1, :2] = False
    with recording() as recorder, blocks(IDS, windowed=windowed):
        mask = attention_mask(2, IDS.shape[1], past + IDS.shape[1], q_offset=past, mask_function=rule, attention_mask=padded)
        assert recorder.mask_of(mask) == Mask("blocks", window, windowed)
    assert torch.equal(mask[:, 0] == 0, seen(IDS, past, window, windowed) & padded[:, None])


def test_outside_the_context_a_mask_is_causal_again():
    with blocks(IDS):
        pass
    common = {"batch_size": 2, "q_length": 7, "kv_length": 7, "mask_function": causal_mask_function}
    assert torch.equal(attention_mask(**common), eager_mask(**common)[:1])


def test_no_block_is_the_causal_mask():
    common = {"batch_size": 2, "q_length": 1, "kv_length": 6, "q_offset": 5, "mask_function": causal_mask_function}
    with blocks(torch.zeros(2, 1, dtype=torch.long)):
        assert torch.equal(attention_mask(**common), attention_mask(**common))


def test_a_rule_that_is_not_causal_is_refused():
    def odd(batch, head, query, key):
        return key <= query + 1

    with blocks(IDS), pytest.raises(ExportError, match="blocks"):
        attention_mask(2, 7, 7, mask_function=odd)


@pytest.mark.parametrize("kind", ["images", "prompt"])
def test_the_cases_have_every_kind_of_block(kind):
    """A block with an empty past, one after a past, one longer than the window, and none while decoding."""
    cases = block_cases(t.Gemma3TextConfig(sliding_window=tiny.WINDOW))
    assert {case.sizes["past"] > 0 for case in cases} == {True, False}
    for case in cases:
        ids = sample(case, kind)
        lengths = [int((ids[row] == block).sum()) for row in range(len(ids)) for block in range(1, int(ids[row].max()) + 1)]
        assert max(lengths) > tiny.WINDOW
        assert kind == "prompt" or ids[0].max() > 1
    decode = dataclasses.replace(cases[0], sizes={"batch": 3, "sequence": 1, "past": 4, "total": 5})
    assert not sample(decode, kind).any()


@pytest.fixture(scope="module")
def gemma3():
    torch.manual_seed(0)
    model = tiny.CHECKPOINTS["gemma3"]()[0].eval()
    tiny.heat(model)
    return model


def _plan(model, extra):
    kv, hidden, vocabulary = probe(model)
    return decoder_plan(
        model, kv, hidden, vocabulary, tiny.CONTEXT, extras=[extra], more_cases=block_cases(model.config.text_config)
    )


@pytest.mark.parametrize("mistake", ["causal", "window"])
def test_a_planted_mistake_is_found(gemma3, tmp_path, mistake):
    """Leaving the blocks out, and letting a block reach beyond the sliding window, both fail the check."""
    right = block_input(gemma3, "images")

    def wrong(model, block_ids, arguments):
        return blocks(block_ids * 0 if mistake == "causal" else block_ids, windowed=False)

    plan = _plan(gemma3, dataclasses.replace(right, traced=wrong))
    graph = trace(plan, gemma3)
    ir.save(graph, tmp_path / "decoder.onnx")
    with pytest.raises(ExportError, match="differs from PyTorch"):
        check(plan, gemma3, tmp_path / "decoder.onnx")


def test_the_models_say_themselves_whether_a_window_limits_blocks():
    """Gemma 3 lets no token see further back than its window, PaliGemma 2 sees the whole of its prompt."""
    torch.manual_seed(0)
    found = {}
    for name, kind in (("gemma3", "images"), ("paligemma2", "prompt")):
        model = tiny.CHECKPOINTS[name]()[0].eval()
        extra = block_input(model, kind)
        arguments = {"attention_mask": torch.ones(1, 12, dtype=torch.long)}
        ids = torch.ones(1, 12, dtype=torch.long)
        with attention_implementation(model, IMPLEMENTATION), recording() as recorder, torch.no_grad():
            with extra.traced(model, ids, arguments):
                model(inputs_embeds=torch.zeros(1, 12, tiny.WIDTH), **arguments, use_cache=False)
            found[name] = [call.mask for call in recorder.calls]
    assert found["gemma3"] == [Mask("blocks", tiny.WINDOW, True), Mask("blocks")]
    assert found["paligemma2"] == [Mask("blocks", tiny.WINDOW, False), Mask("blocks")]


def test_metadata(portable_bundle):
    graph = ir.load(portable_bundle("gemma3") / "portable" / "decoder.onnx").graph
    found = [node.metadata_props for node in graph if node.op_type == "Attention"]
    assert [one["vlm_edge.mask"] for one in found] == ["blocks", "blocks"]
    assert [one.get("vlm_edge.sliding_window") for one in found] == [str(tiny.WINDOW), None]
    assert [one.get("vlm_edge.windowed_blocks") for one in found] == ["1", None]
