"""What the captioners of the zoo split into, and which models that look like them are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vlm_edge.export.checkpoint import Checkpoint, identify, load
from vlm_edge.families import registry
from vlm_edge.families.base import Split
from vlm_edge.families.cross_contrast import contrast_plans
from vlm_edge.families.cross_recurrent import recurrent_plans
from vlm_edge_runtime.bundle.manifest import GenerativeContract
from vlm_edge_runtime.errors import UnsupportedModelError


@pytest.fixture
def opened(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], tuple[Checkpoint, Split]]:
    def make(name: str) -> tuple[Checkpoint, Split]:
        folder = tiny_checkpoint(name)
        config, entry, family = identify(folder, None, False)
        checkpoint = load(folder, entry.auto_class or family.auto_class, config)
        checkpoint.model.eval()
        with torch.no_grad():
            return checkpoint, family.split(checkpoint, entry)

    return make


def _generative(split: Split) -> GenerativeContract:
    assert isinstance(split.contract, GenerativeContract)
    return split.contract


def test_a_recurrent_decoder(opened) -> None:
    _, split = opened("show_attend_tell")
    contract = _generative(split)
    assert [plan.role for plan in split.graphs] == ["vision_encoder", "cross_kv", "embed_tokens", "decoder"]
    assert contract.kv.layers == 0 and contract.prompt.start_tokens == [2]
    decoder = split.graphs[-1]
    assert [spec.name for spec in decoder.outputs] == ["logits", "attention", "present_state.0", "present_state.1"]
    assert [spec.shape for spec in decoder.inputs if spec.name.startswith("state.")] == [("batch", 64)] * 2


def test_a_captioner_that_compares(opened) -> None:
    checkpoint, split = opened("coca")
    contrast = _generative(split).contrast
    assert contrast is not None
    assert contrast.image_graphs == ["contrast_head"] and contrast.embedding_dim == 32
    assert contrast.end_token_id == checkpoint.tokenizer.convert_tokens_to_ids("[CLS]")
    assert contrast.similarity.logit_scale == pytest.approx(checkpoint.model.logit_scale.exp().item())
    head, text = split.graphs[-2:]
    assert (head.role, text.role) == ("contrast_head", "text_encoder")
    assert head.inputs == split.graphs[0].outputs  # one encoding of an image for both
    ids, mask = text.sample(text.cases[0])
    assert (ids[torch.arange(2), mask.sum(-1) - 1] == contrast.end_token_id).all() and not mask.all()


def test_a_captioner_alone(opened) -> None:
    checkpoint, split = opened("visual_gpt")
    assert _generative(split).contrast is None
    with pytest.raises(UnsupportedModelError, match=r"has no get_text_features"):
        contrast_plans(checkpoint, checkpoint.model.encoder, checkpoint.model.decoder, split.graphs[0].outputs[0], length=16)
    with pytest.raises(UnsupportedModelError, match=r"has no begin\(\)"):
        recurrent_plans(checkpoint, checkpoint.model.encoder, checkpoint.model.decoder)


def test_the_registry_knows_where_they_are_defined() -> None:
    for name in ("visual_gpt", "coca", "show_attend_tell"):
        assert registry.lookup(name).zoo == name
