"""PaLM-E is what its paper says: a sentence of words, images and states, every one of them embeddings of one row."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from tiny.visual_tokens import BINS, HIGH, LOW
from transformers import AutoModelForImageTextToText

from vlm_edge.zoo.palm_e import PaLMEForConditionalGeneration
from vlm_edge_runtime.bundle.manifest import ActionTokens
from vlm_edge_runtime.decode.actions import decode_actions
from vlm_edge_runtime.errors import PromptError

RULE = ActionTokens(first_token=tiny.VOCABULARY - BINS, bins=BINS, low=LOW, high=HIGH)


@pytest.fixture(scope="module")
def model() -> PaLMEForConditionalGeneration:
    torch.manual_seed(0)
    made = tiny.CHECKPOINTS["palm_e"]()[0].eval()
    tiny.heat(made)
    return made


@torch.no_grad()
def test_a_multimodal_sentence(model) -> None:
    """Equation 2: x_i is a word's embedding or a row of an observation's encoder, in the order of the sentence."""
    generator = torch.Generator().manual_seed(1)
    pixels, states = torch.randn(2, 3, tiny.IMAGE, tiny.IMAGE, generator=generator), torch.randn(2, 6, generator=generator)
    image, state, tokens = model.config.image_token_id, model.config.state_token_id, model.config.image_tokens
    ids = torch.tensor([[2, state, 40, *[image] * tokens, 41, state, *[image] * tokens, 42]])
    embeds = model.get_input_embeddings()(ids)
    features, vectors = model.get_image_features(pixels).pooler_output, model.state_encoder(states)
    embeds[0, 1], embeds[0, 4 + tokens] = vectors[0], vectors[1]
    embeds[0, 3 : 3 + tokens], embeds[0, 5 + tokens : 5 + 2 * tokens] = features[0], features[1]
    found = model(ids, pixels, states=states).logits
    torch.testing.assert_close(found, model.language_model(inputs_embeds=embeds).logits)
    with pytest.raises(ValueError, match="2 tokens"):
        model(ids, pixels, states=states[:1])


@torch.no_grad()
def test_image_tokens_are_mapped_affinely(model) -> None:
    pixels = torch.randn(1, 3, tiny.IMAGE, tiny.IMAGE, generator=torch.Generator().manual_seed(2))
    tokens = model.vision_tower(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output, model.image_map(tokens))


def test_actions_are_the_middles_of_bins() -> None:
    first = RULE.first_token
    found = decode_actions(RULE, [7, first, first + BINS - 1, first + 8, 9, first + 1, first, first, 3])
    low, high = np.array(LOW), np.array(HIGH)
    width = (high - low) / BINS
    np.testing.assert_allclose(found, [low + width * [0.5, BINS - 0.5, 8.5], low + width * [1.5, 0.5, 0.5]], rtol=0, atol=1e-6)
    assert found.dtype == np.float32
    assert decode_actions(RULE, [1, 2, 3]).shape == (0, 3)
    with pytest.raises(PromptError, match="breaks off inside one"):
        decode_actions(RULE, [first, first])


def test_every_value_comes_back_within_half_a_bin() -> None:
    values = np.random.default_rng(0).uniform(LOW, HIGH, (50, 3))
    bins = ((values - LOW) / (np.array(HIGH) - LOW) * BINS).astype(int)
    found = decode_actions(RULE, (bins + RULE.first_token).reshape(-1).tolist())
    assert (np.abs(found - values) <= (np.array(HIGH) - LOW) / BINS / 2 + 1e-6).all()


@torch.no_grad()
def test_it_is_an_ordinary_checkpoint(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    states = torch.randn(1, 6, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[2, model.config.state_token_id, 50]])
    torch.testing.assert_close(loaded(ids, states=states).logits, model(ids, states=states).logits)
    assert loaded.config.action_tokens == model.config.action_tokens
