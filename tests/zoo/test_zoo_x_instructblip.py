"""X-InstructBLIP as a model: saved and loaded, each kind of input where it belongs, the instruction seen by both Q-Formers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from vlm_edge.zoo.x_instructblip import XInstructBlipForConditionalGeneration, prompt, sinusoids


@pytest.fixture(scope="module")
def folder(tiny_checkpoint):
    return tiny_checkpoint("x_instructblip")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.fixture
def inputs(model, folder):
    words, questions = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder / "qformer_tokenizer")
    generator = torch.Generator().manual_seed(3)
    text = "what is in the picture?"
    return {
        **words(prompt(model.config, words, text, images=1, audio=1), return_tensors="pt", return_token_type_ids=False),
        **{f"qformer_{name}": value for name, value in questions(text, return_tensors="pt", return_token_type_ids=False).items()},
        "pixel_values": torch.randn(1, 3, 32, 32, generator=generator),
        "audio_features": torch.randn(1, 9, model.config.audio_config.feature_size, generator=generator),
    }


def test_is_an_ordinary_model(model, folder, tmp_path) -> None:
    assert isinstance(model, XInstructBlipForConditionalGeneration)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for (name, one), (other_name, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(one, other)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.audio_config.feature_size == 24
    assert config.audio_qformer_config.encoder_hidden_size == config.audio_config.hidden_size


def test_prompt(model, folder) -> None:
    words = AutoTokenizer.from_pretrained(folder)
    written = prompt(model.config, words, "is it loud?", images=1, audio=2)
    queries = model.config.num_query_tokens
    assert written == " image: " + "<image>" * queries + (" audio: " + "<audio>" * queries) * 2 + "is it loud?"


@torch.inference_mode()
def test_features_take_their_places(model, inputs) -> None:
    embeddings = model.embed(**{name: value for name, value in inputs.items() if name != "attention_mask"})
    text = (inputs["qformer_input_ids"], inputs["qformer_attention_mask"])
    for token, features in (
        (model.config.image_token_id, model.get_image_features(inputs["pixel_values"], *text)),
        (model.config.audio_token_id, model.get_audio_features(inputs["audio_features"], *text)),
    ):
        assert features.pooler_output.shape == (1, model.config.num_query_tokens, model.config.text_config.hidden_size)
        assert torch.equal(embeddings[inputs["input_ids"] == token], features.pooler_output[0])


@torch.inference_mode()
def test_everything_given_counts(model, inputs) -> None:
    logits = model(**inputs).logits
    for name in ("pixel_values", "audio_features"):
        assert not torch.allclose(model(**{**inputs, name: inputs[name] + 0.5}).logits[:, -1], logits[:, -1], atol=1e-3)
    other = {**inputs, "qformer_input_ids": inputs["qformer_input_ids"].roll(1, 1)}
    assert not torch.allclose(model(**other).logits[:, -1], logits[:, -1], atol=1e-3)
    shuffled = {**inputs, "audio_features": inputs["audio_features"].flip(1)}  # positions in the audio encoder
    assert not torch.allclose(model(**shuffled).logits[:, -1], logits[:, -1], atol=1e-3)


@torch.inference_mode()
def test_padding_of_the_instruction_changes_nothing(model, inputs) -> None:
    ids, mask = inputs["qformer_input_ids"], inputs["qformer_attention_mask"]
    padded = torch.nn.functional.pad(ids, (0, 3), value=7), torch.nn.functional.pad(mask, (0, 3))
    for features, values in (
        (model.get_image_features, inputs["pixel_values"]),
        (model.get_audio_features, inputs["audio_features"]),
    ):
        torch.testing.assert_close(
            features(values, *padded).pooler_output, features(values, ids, mask).pooler_output, rtol=0, atol=2e-5
        )


def test_one_instruction_serves_several_inputs(model, inputs) -> None:
    with torch.inference_mode():
        text = (inputs["qformer_input_ids"], inputs["qformer_attention_mask"])
        pixels = torch.cat([inputs["pixel_values"], -inputs["pixel_values"]])
        both = model.get_image_features(pixels, *text).pooler_output
        for row in range(2):
            alone = model.get_image_features(pixels[row : row + 1], *text).pooler_output
            torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=2e-5)


def test_an_input_without_an_instruction_is_refused(model, inputs) -> None:
    with pytest.raises(ValueError, match="qformer_input_ids"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])


def test_sinusoids() -> None:
    found = sinusoids(torch.zeros(1, 4, 6))
    assert torch.allclose(found[0], torch.tensor([0.0, 0, 0, 1, 1, 1]))
    assert torch.allclose(found[2, 0], torch.tensor(2.0).sin())
    assert torch.allclose(found[3, 5], torch.tensor(3 * 10000 ** (-4 / 6)).cos())
