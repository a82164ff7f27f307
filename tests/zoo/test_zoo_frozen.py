"""Frozen is what its paper says: a pooled vector becomes k embeddings before a language model that does not learn."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText

from vlm_edge.zoo.frozen import FrozenForConditionalGeneration, StandardisedConv2d


@pytest.fixture(scope="module")
def model() -> FrozenForConditionalGeneration:
    torch.manual_seed(0)
    made = tiny.CHECKPOINTS["frozen"]()[0].eval()
    tiny.heat(made)
    return made


def test_filters_are_standardised() -> None:
    """Mean 0 and variance 1 / N each, whatever the weights (arXiv 2101.08692, equation 1)."""
    torch.manual_seed(1)
    layer = StandardisedConv2d(5, 7, 3)
    with torch.no_grad():
        layer.weight.mul_(3).add_(2)
        layer.bias.zero_()
        inputs = torch.eye(5 * 9).reshape(45, 5, 3, 3)
        filters = layer(inputs)[:, :, 1, 1].t()  # one number per weight
    torch.testing.assert_close(filters.mean(1), torch.zeros(7), atol=1e-6, rtol=0)
    torch.testing.assert_close(filters.var(1, unbiased=False), torch.full((7,), 1 / 45), atol=1e-6, rtol=0)


@torch.no_grad()
def test_signals_keep_their_size_without_normalisers() -> None:
    """After many blocks at initialisation the variance is still of order one (arXiv 2101.08692, section 3)."""
    from vlm_edge.zoo.frozen import FrozenConfig, NFResNet

    torch.manual_seed(2)
    encoder = NFResNet(FrozenConfig(image_size=64, channels=[32, 32, 32], depth=4))
    maps = encoder.blocks(encoder.stem(torch.randn(4, 3, 64, 64)))
    assert 0.3 < maps.std() < 3


@torch.no_grad()
def test_the_visual_prefix(model) -> None:
    pixels = torch.randn(3, 3, tiny.IMAGE, tiny.IMAGE, generator=torch.Generator().manual_seed(1))
    features = model.get_image_features(pixels)
    assert features.last_hidden_state.shape == (3, 32)
    expected = model.visual_prefix.linear(features.last_hidden_state).reshape(3, 2, tiny.WIDTH)
    torch.testing.assert_close(features.pooler_output, expected)


def test_only_the_visual_side_learns(model) -> None:
    image = model.config.image_token_id
    pixels = torch.randn(2, 3, tiny.IMAGE, tiny.IMAGE, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[image, image, 50, image, image, 51, 52]])
    loss = model(ids, pixels, labels=ids).loss
    loss.backward()
    assert all(parameter.grad is None for parameter in model.language_model.parameters())
    assert model.visual_prefix.linear.weight.grad.abs().max() > 0
    assert model.vision_encoder.stem.weight.grad.abs().max() > 0
    model.zero_grad()


@torch.no_grad()
def test_it_is_an_ordinary_checkpoint(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    pixels = torch.randn(1, 3, tiny.IMAGE, tiny.IMAGE, generator=torch.Generator().manual_seed(4))
    ids = torch.tensor([[model.config.image_token_id] * 2 + [50, 51]])
    torch.testing.assert_close(loaded(ids, pixels).logits, model(ids, pixels).logits)
