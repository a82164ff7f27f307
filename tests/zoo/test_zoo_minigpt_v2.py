"""MiniGPT-v2 is what its paper says: four adjacent visual tokens end to end become one, in the places of image tokens."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from vlm_edge.zoo.minigpt_v2 import MiniGPTv2Config, MiniGPTv2ForConditionalGeneration


@pytest.fixture(scope="module")
def model() -> MiniGPTv2ForConditionalGeneration:
    torch.manual_seed(0)
    made = tiny.CHECKPOINTS["minigpt_v2"]()[0].eval()
    tiny.heat(made)
    return made


@torch.no_grad()
def test_four_neighbours_are_concatenated_and_projected(model) -> None:
    pixels = torch.randn(2, 3, tiny.IMAGE, tiny.IMAGE, generator=torch.Generator().manual_seed(1))
    seen = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    found = model.get_image_features(pixels).pooler_output
    assert found.shape == (2, model.config.image_tokens, tiny.WIDTH) == (2, 4, tiny.WIDTH)
    second = torch.cat([seen[1, 4], seen[1, 5], seen[1, 6], seen[1, 7]])
    torch.testing.assert_close(found[1, 1], model.projector.linear(second), rtol=0, atol=1e-5)


def test_448_pixels_make_256_tokens() -> None:
    assert (
        MiniGPTv2Config(vision_config={"model_type": "clip_vision_model", "image_size": 448, "patch_size": 14}).image_tokens
        == 256
    )


@torch.no_grad()
def test_features_stand_at_their_tokens(model) -> None:
    """What the model reads is what its language model reads when the features are put in by hand."""
    pixels = torch.randn(1, 3, tiny.IMAGE, tiny.IMAGE, generator=torch.Generator().manual_seed(2))
    image = model.config.image_token_id
    ids = torch.tensor([[2, 40, image, image, image, image, 41, 42]])
    embeds = model.get_input_embeddings()(ids)
    embeds[0, 2:6] = model.get_image_features(pixels).pooler_output[0]
    torch.testing.assert_close(model(ids, pixels).logits, model.language_model(inputs_embeds=embeds).logits)
    with pytest.raises(ValueError, match="3 tokens"):
        model(ids[:, :5], pixels)


@torch.no_grad()
def test_it_is_an_ordinary_checkpoint(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MiniGPTv2Config)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[2, 40, 41]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.generate(ids, do_sample=False, max_new_tokens=3).shape == (1, 6)
