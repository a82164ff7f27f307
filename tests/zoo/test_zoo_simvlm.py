"""SimVLM is what its paper says: one objective, a prefix seen in both directions, a suffix written causally."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from vlm_edge.families import registry
from vlm_edge.zoo.simvlm import SimVLMForConditionalGeneration

IMAGE_TOKENS = 16


@pytest.fixture(scope="module")
def model() -> SimVLMForConditionalGeneration:
    torch.manual_seed(0)
    made = tiny.CHECKPOINTS["simvlm"]()[0].eval()
    tiny.heat(made)
    return made


@pytest.fixture(scope="module")
def inputs(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(8, 300, (2, 6), generator=generator)
    image = torch.full((2, IMAGE_TOKENS), model.config.image_token_id)
    pixels = torch.randn(2, 3, tiny.IMAGE, tiny.IMAGE, generator=generator)
    return {"input_ids": torch.cat([image, text], 1), "pixel_values": pixels}


def prefix(inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    """Token types in which the first `tokens` are the prefix."""
    return (torch.arange(inputs["input_ids"].shape[1]) >= tokens).long().expand_as(inputs["input_ids"])


@torch.no_grad()
def _changed(model, inputs, token_types, index: int) -> list[int]:
    """The places whose logits change with the token at `index`."""
    other = inputs["input_ids"].clone()
    other[:, index] = 7
    before = model(**inputs, token_type_ids=token_types).logits
    after = model(**{**inputs, "input_ids": other}, token_type_ids=token_types).logits
    return (before - after).abs().amax((0, 2)).gt(1e-6).nonzero()[:, 0].tolist()


def test_the_prefix_sees_itself_in_both_directions_and_the_suffix_what_is_before_it(model, inputs):
    types, length = prefix(inputs, IMAGE_TOKENS + 3), IMAGE_TOKENS + 6
    assert _changed(model, inputs, types, IMAGE_TOKENS + 2) == list(range(length))  # in the prefix: the image sees it too
    assert _changed(model, inputs, types, IMAGE_TOKENS + 4) == [length - 2, length - 1]
    darker = {**inputs, "pixel_values": inputs["pixel_values"] - 1}
    with torch.no_grad():
        difference = model(**inputs, token_type_ids=types).logits - model(**darker, token_type_ids=types).logits
    assert (difference.abs().amax(-1) > 1e-4).all()


def test_without_token_types_everything_is_causal(model, inputs):
    assert _changed(model, inputs, None, IMAGE_TOKENS + 2) == list(range(IMAGE_TOKENS + 2, IMAGE_TOKENS + 6))


@torch.no_grad()
def test_the_loss_is_equation_3(model, inputs):
    """The mean over i ≥ T_p of −log P(x_i | x_<i), the prefix read in both directions."""
    start = IMAGE_TOKENS + 2
    labels = inputs["input_ids"].clone()
    labels[:, :start] = -100
    loss = model(**inputs, labels=labels).loss
    logits = model(**inputs, token_type_ids=prefix(inputs, start)).logits
    each = torch.log_softmax(logits[:, start - 1 : -1], -1).gather(-1, labels[:, start:, None])
    assert torch.allclose(loss, -each.mean(), atol=1e-6)
    causal = torch.log_softmax(model(**inputs).logits[:, start - 1 : -1], -1).gather(-1, labels[:, start:, None])
    assert not torch.allclose(loss, -causal.mean(), atol=1e-2)


@torch.no_grad()
def test_generate_takes_the_prompt_as_its_prefix(model, inputs):
    """Greedy decoding with the cache gives what running the whole sequence anew for every token gives."""
    made = model.generate(**inputs, do_sample=False, max_new_tokens=6, eos_token_id=None)
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    for _ in range(6):
        types = (torch.arange(ids.shape[1]) >= length).long().expand_as(ids)
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"], token_type_ids=types).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, ids)


@torch.no_grad()
def test_prefixes_of_different_lengths_in_a_batch(model, inputs):
    """A row padded on the left says what it says alone."""
    ids, pad = inputs["input_ids"], model.config.pad_token_id
    short = ids[:1, :-2]
    padded = torch.cat([torch.cat([torch.full((1, 2), pad), short], 1), ids[1:]])
    mask = torch.ones_like(padded)
    mask[0, :2] = 0
    options = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    together = model.generate(input_ids=padded, attention_mask=mask, pixel_values=inputs["pixel_values"], **options)
    for row, (own, pixels) in enumerate(zip((short, ids[1:]), inputs["pixel_values"].split(1), strict=True)):
        alone = model.generate(input_ids=own, pixel_values=pixels, **options)
        assert torch.equal(together[row, -5:], alone[0, -5:])


@torch.no_grad()
def test_saved_and_loaded_by_the_auto_classes(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    assert registry.lookup("simvlm").zoo == "simvlm"
    assert type(AutoConfig.from_pretrained(tmp_path)).__name__ == "SimVLMConfig"
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert isinstance(again, SimVLMForConditionalGeneration)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_image_tokens_follow_from_the_convolutions(model):
    assert model.config.image_tokens == IMAGE_TOKENS
    features = model.get_image_features(torch.zeros(3, 3, tiny.IMAGE, tiny.IMAGE)).pooler_output
    assert features.shape == (3, IMAGE_TOKENS, tiny.WIDTH)
