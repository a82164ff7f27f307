"""Show-Attend-Tell is what its paper says: an LSTM that looks at the image anew for every word."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText

from vlm_edge.zoo.show_attend_tell import ShowAttendTellForConditionalGeneration


@pytest.fixture(scope="module")
def model() -> ShowAttendTellForConditionalGeneration:
    torch.manual_seed(0)
    made = tiny.CHECKPOINTS["show_attend_tell"]()[0].eval()
    tiny.heat(made)
    return made


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, tiny.IMAGE, tiny.IMAGE, generator=torch.Generator().manual_seed(1))


def _linear(layer: torch.nn.Linear, vector: torch.Tensor) -> torch.Tensor:
    return layer.weight @ vector + layer.bias


@torch.no_grad()
def test_the_equations(model, pixels) -> None:
    """Three words of one image, vector by vector."""
    decoder, words = model.decoder, [2, 40, 77]
    places = model.encoder(pixels)[0]
    assert places.shape == (model.config.places, model.config.conv_channels[-1])
    hidden, memory = (torch.tanh(_linear(layer, places.mean(0))) for layer in (decoder.init_h, decoder.init_c))
    found = model(torch.tensor([words]), pixels[:1])
    for number, word in enumerate(words):
        embedding = decoder.embed_tokens.weight[word]
        scores = torch.stack(  # equation 4
            [
                _linear(
                    decoder.attend_score, torch.tanh(_linear(decoder.attend_image, a) + _linear(decoder.attend_state, hidden))
                )
                for a in places
            ]
        )[:, 0]
        weights = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()  # equation 5
        beta = torch.sigmoid(_linear(decoder.gate, hidden))  # section 4.2.1
        context = beta * sum(weight * a for weight, a in zip(weights, places, strict=True))  # equation 13
        parts = _linear(decoder.from_word, embedding) + _linear(decoder.from_state, hidden) + _linear(decoder.from_image, context)
        i, f, o, g = parts.split(tiny.WIDTH)  # equation 1
        memory = torch.sigmoid(f) * memory + torch.sigmoid(i) * torch.tanh(g)  # equation 2
        hidden = torch.sigmoid(o) * torch.tanh(memory)  # equation 3
        spoken = embedding + _linear(decoder.out_state, hidden) + _linear(decoder.out_image, context)
        torch.testing.assert_close(found.logits[0, number], _linear(decoder.lm_head, spoken), atol=1e-4, rtol=1e-4)  # equation 7
        torch.testing.assert_close(found.attention[0, number], weights, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_text_in_pieces_is_the_text(model, pixels) -> None:
    """h and c are all that is carried over."""
    decoder, features = model.decoder, model.encoder(pixels)
    keys, states = decoder.attend_image(features), decoder.begin(features)
    words = decoder.embed_tokens(torch.tensor([[2, 40, 77, 9, 12]] * 2))
    whole, attention, after = decoder(words, features, keys, states)
    first, looked, between = decoder(words[:, :2], features, keys, states)
    rest, looked_on, last = decoder(words[:, 2:], features, keys, between)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    torch.testing.assert_close(torch.cat([looked, looked_on], 1), attention)
    for one, other in zip(after, last, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 5))


def test_training_wants_every_place_looked_at(model, pixels) -> None:
    """λ Σ (1 − Σ_t α_ti)², equation 14, over the words that are told."""
    labels = torch.tensor([[2, 40, 77, 3], [2, 41, 3, -100]])
    found = model(labels.clamp(min=0), pixels, labels=labels)
    looked = torch.stack([found.attention[0, :3].sum(0), found.attention[1, :2].sum(0)])
    penalty = model.config.attention_penalty * (1 - looked).square().sum(1).mean()
    told = [(0, 0, 40), (0, 1, 77), (0, 2, 3), (1, 0, 41), (1, 1, 3)]
    words = torch.stack([-found.logits.log_softmax(-1)[place] for place in told]).mean()
    torch.testing.assert_close(found.loss, words + penalty)
    found.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()


@torch.no_grad()
def test_captions(model, pixels) -> None:
    """Greedy generation is the argmax, word after word."""
    found = model.generate(pixels, max_new_tokens=5, do_sample=False, eos_token_id=None)
    ids = torch.full((2, 1), 2)
    for _ in range(5):
        ids = torch.cat([ids, model(ids, pixels).logits[:, -1:].argmax(-1)], 1)
    assert found.tolist() == ids.tolist()


@torch.no_grad()
def test_it_is_an_ordinary_checkpoint(model, pixels, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[2, 50, 51]] * 2)
    torch.testing.assert_close(loaded(ids, pixels).logits, model(ids, pixels).logits)
