"""The registered attention and its mask: the same numbers as transformers' eager path, and nothing left changed."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    eager_mask,
    sliding_window_causal_mask_function,
)

from vlm_edge.export import attention as ours
from vlm_edge.export.attention import Mask, attention_implementation, attention_mask, recording
from vlm_edge_runtime.errors import ExportError

CHUNKED = chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("rule", "described"),
    [
        (causal_mask_function, Mask("causal")),
        (sliding_window_causal_mask_function(3), Mask("causal", 3)),
        (bidirectional_mask_function, Mask("bidirectional")),
        (CHUNKED, Mask("explicit")),
    ],
)
@pytest.mark.parametrize(("queries", "past"), [(5, 0), (1, 6), (3, 4)])
def test_mask_is_the_one_transformers_draws(rule, described, queries, past):
    keys = queries + past
    padded = torch.ones(2, keys, dtype=torch.bool)
    padded[0, :2] = False
    common = {"batch_size": 2, "q_length": queries, "kv_length": keys, "q_offset": past, "mask_function": rule}
    with recording() as recorder:
        mask = attention_mask(**common, attention_mask=padded)
        expected = eager_mask(**common, attention_mask=padded)
        assert recorder.mask_of(mask) == described
    assert torch.equal(mask.expand_as(expected), expected)


def test_no_mask_where_everything_is_seen():
    assert attention_mask(1, 4, 4, mask_function=bidirectional_mask_function) is None


def test_a_mask_made_elsewhere_is_explicit():
    with recording() as recorder:
        assert recorder.mask_of(torch.zeros(1, 1, 2, 2)) == Mask("explicit")
        assert recorder.mask_of(None) == Mask("bidirectional")


def test_traces_do_not_nest():
    with recording(), pytest.raises(ExportError, match="already running"), recording():
        pass
    with recording():  # and the failed one has not spoilt the next
        pass


def _llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def test_implementation_is_restored_after_an_exception():
    model = _llama()
    with pytest.raises(RuntimeError), attention_implementation(model, ours.IMPLEMENTATION):
        assert model.config._attn_implementation == ours.IMPLEMENTATION
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"
    assert all(part.config._attn_implementation == "sdpa" for part in model.modules() if hasattr(part, "config"))


def test_registered_attention_runs_in_pytorch_too():
    model = _llama()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(ids).logits
        with attention_implementation(model, ours.IMPLEMENTATION):
            found = model(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
