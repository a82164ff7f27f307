"""VisualGPT is what its paper says: a gate that balances what is seen and what the language model knows."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText, GPT2Config, GPT2LMHeadModel

from vlm_edge.zoo.visual_gpt import SelfResurrectingGate, VisualGPTForCausalLM, VisualGPTForConditionalGeneration


@pytest.fixture(scope="module")
def model() -> VisualGPTForConditionalGeneration:
    torch.manual_seed(0)
    made = tiny.CHECKPOINTS["visual_gpt"]()[0].eval()
    tiny.heat(made)
    return made


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_the_gate(threshold: float) -> None:
    """Equations 4 and 6, number by number: what lies below the threshold is nothing at all."""
    states, attended = [-3.0, -1.5, -1.3, 0.0, 0.7, 1.3, 1.5, 3.0], [5.0, -4.0, 3.0, 2.0, -1.0, 7.0, -6.0, 1.0]
    expected = []
    for state, seen in zip(states, attended, strict=True):
        visual, language = _sigmoid(state), 1 - _sigmoid(state)
        expected.append((visual if visual > threshold else 0) * seen + (language if language > threshold else 0) * state)
    found = SelfResurrectingGate(threshold)(torch.tensor(states), torch.tensor(attended))
    torch.testing.assert_close(found, torch.tensor(expected))
    if threshold:  # σ(±1.5) is 0.18 and 0.82: one side of the balance is off
        assert found[1] == pytest.approx((1 - _sigmoid(-1.5)) * -1.5) and found[6] == pytest.approx(_sigmoid(1.5) * -6)


def test_a_gate_that_is_off_can_come_back() -> None:
    """The other side still moves the state (section 3.2): its gradient is not zero."""
    states = torch.tensor([-3.0, 3.0], requires_grad=True)
    SelfResurrectingGate(0.2)(states, torch.tensor([2.0, 2.0])).sum().backward()
    assert (states.grad.abs() > 0).all()


@torch.no_grad()
def test_every_layer_enters_through_the_gate(model) -> None:
    """One layer by hand: self-attention, cross-attention, gate, feed-forward."""
    block = model.decoder.transformer.h[0]
    generator = torch.Generator().manual_seed(1)
    states, image = (torch.randn(2, tokens, tiny.WIDTH, generator=generator) for tokens in (5, 3))
    after = states + block.attn(block.ln_1(states))[0]
    seen = block.crossattention(block.ln_cross_attn(after), encoder_hidden_states=image)[0]
    visual, language = torch.sigmoid(after), 1 - torch.sigmoid(after)
    assert (visual <= 0.2).any() and (language <= 0.2).any()
    mixed = torch.where(visual > 0.2, visual, 0.0) * seen + torch.where(language > 0.2, language, 0.0) * after
    torch.testing.assert_close(block(states, encoder_hidden_states=image), mixed + block.mlp(block.ln_2(mixed)))


@torch.no_grad()
def test_without_an_image_it_is_the_language_model(model) -> None:
    """A pretrained GPT-2 loads into it, and says what it said before."""
    sizes = {key: getattr(model.decoder.config, key) for key in ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions")}
    plain = GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False)).eval()
    tiny.heat(plain, 5)
    gated = VisualGPTForCausalLM(model.decoder.config).eval()
    missing, unexpected = gated.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all("cross" in name for name in missing)
    ids = torch.tensor([[5, 9, 40, 7]])
    torch.testing.assert_close(gated(ids).logits, plain(ids).logits)


@torch.no_grad()
def test_it_is_an_ordinary_checkpoint(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, tiny.IMAGE, tiny.IMAGE, generator=torch.Generator().manual_seed(4))
    ids = torch.tensor([[2, 50, 51]] * 2)
    found = loaded(pixel_values=pixels, decoder_input_ids=ids).logits
    torch.testing.assert_close(found, model(pixel_values=pixels, decoder_input_ids=ids).logits)
    assert (found[0] - found[1]).abs().max() > 0.1  # it reads the image
