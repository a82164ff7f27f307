"""CoCa is what its paper says: one image encoder, one decoder in two halves, a caption and a comparison."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText

from vlm_edge.zoo.coca import CoCaForConditionalGeneration


@pytest.fixture(scope="module")
def model() -> CoCaForConditionalGeneration:
    torch.manual_seed(0)
    made = tiny.CHECKPOINTS["coca"]()[0].eval()
    tiny.heat(made)
    return made


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, tiny.IMAGE, tiny.IMAGE, generator=torch.Generator().manual_seed(1))


def _texts(model) -> tuple[torch.Tensor, torch.Tensor]:
    end, pad = model.decoder.config.cls_token_id, 1
    ids = torch.tensor([[2, 40, 41, 42, end], [2, 50, end, pad, pad]])
    return ids, (ids != pad).long()


@torch.no_grad()
def test_the_poolers_are_a_cascade(model, pixels) -> None:
    """Caption queries over the patches, one contrastive query over those (section 3.2)."""
    encoder = model.encoder
    patches = encoder.vit(pixels).last_hidden_state
    found = encoder(pixels)
    assert found.last_hidden_state.shape == (3, 5, tiny.WIDTH) and found.pooler_output.shape == (3, 32)
    torch.testing.assert_close(found.last_hidden_state, encoder.caption_pooler(patches))
    one = encoder.contrastive_pooler(found.last_hidden_state)
    assert one.shape[1] == 1
    torch.testing.assert_close(found.pooler_output, encoder.projection(one[:, 0]))


@torch.no_grad()
def test_a_pooler_attends_to_every_patch_and_to_their_order_not_at_all(model, pixels) -> None:
    patches = model.encoder.vit(pixels).last_hidden_state
    pooler = model.encoder.caption_pooler
    shuffled = patches[:, torch.randperm(patches.shape[1], generator=torch.Generator().manual_seed(2))]
    torch.testing.assert_close(pooler(patches), pooler(shuffled), atol=1e-5, rtol=1e-4)
    for place in range(patches.shape[1]):
        other = patches.clone()
        other[:, place] = -other[:, place]
        assert (pooler(other) - pooler(patches)).abs().max() > 1e-4


@torch.no_grad()
def test_the_first_half_of_the_decoder_does_not_see_the_image(model, pixels) -> None:
    decoder = model.decoder
    features = model.encoder(pixels[:1]).last_hidden_state
    seen = [
        decoder(torch.tensor([[2, 40, 41]]), encoder_hidden_states=image, output_hidden_states=True).hidden_states
        for image in (features, -features)
    ]
    unimodal = decoder.config.unimodal_layers
    for layer in range(unimodal + 1):
        torch.testing.assert_close(seen[0][layer], seen[1][layer])
    assert (seen[0][unimodal + 1] - seen[1][unimodal + 1]).abs().max() > 0.1
    assert not hasattr(decoder.transformer.h[0], "crossattention") and hasattr(decoder.transformer.h[-1], "crossattention")


@torch.no_grad()
def test_a_text_is_the_unimodal_state_of_its_last_token(model) -> None:
    """[CLS] sees the whole text; padding after it changes nothing; the captioner's states are the same without it."""
    decoder, (ids, mask) = model.decoder, _texts(model)
    vectors = decoder.embed_text(ids, mask)
    alone = decoder.embed_text(ids[1:, :3], mask[1:, :3])
    torch.testing.assert_close(vectors[1:], alone, atol=1e-5, rtol=1e-4)
    features = torch.zeros(1, 5, tiny.WIDTH)
    states = decoder(ids[:1], encoder_hidden_states=features, output_hidden_states=True).hidden_states
    expected = decoder.text_projection(decoder.cls_norm(states[decoder.config.unimodal_layers][:, -1]))
    torch.testing.assert_close(vectors[:1], expected, atol=1e-5, rtol=1e-4)
    for place in range(4):
        other = ids[:1].clone()
        other[0, place] = 99
        assert (decoder.embed_text(other, mask[:1]) - vectors[:1]).abs().max() > 1e-3


@torch.no_grad()
def test_the_similarity(model, pixels) -> None:
    """exp(logit_scale) times the cosine (equation 2)."""
    ids, mask = _texts(model)
    found = model.similarity(pixels, ids, mask)
    for row in range(3):
        for column in range(2):
            cosine = torch.cosine_similarity(found.image_embeds[row], found.text_embeds[column], dim=0)
            torch.testing.assert_close(found.logits_per_image[row, column], model.logit_scale.exp() * cosine)
    assert model.logit_scale.item() == pytest.approx(2.6593)


@torch.no_grad()
def test_it_is_an_ordinary_checkpoint(model, pixels, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    ids, mask = _texts(model)
    torch.testing.assert_close(
        loaded.similarity(pixels, ids, mask).logits_per_image, model.similarity(pixels, ids, mask).logits_per_image
    )
    words = torch.tensor([[2, 50, 51]] * 3)
    found = loaded(pixel_values=pixels, decoder_input_ids=words).logits
    torch.testing.assert_close(found, model(pixel_values=pixels, decoder_input_ids=words).logits)
