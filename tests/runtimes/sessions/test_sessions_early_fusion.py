"""Chameleon, CM3Leon and Janus answer as transformers does, token for token; an image's codes are the tokenizer's own.

The images that Janus writes: test_sessions_image_output.py.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from session_pictures import noise
from transformers import AutoModelForImageTextToText, AutoProcessor, ChameleonProcessor, JanusProcessor

from vlm_edge.families import registry

NEW = 10
QUESTIONS = [
    "what is in the picture?",
    "describe this image, please.",
    "how many shapes are there?",
    "is there a red circle?",
    "the cat sat on",
    "a photo of",
    "USER: which colour? ASSISTANT:",
    "two photos of the sea, of a house",
]
CODES = ["chameleon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cm3leon", "chameleon-swin"))]
NAMES = [*CODES, "janus"]
PICTURES = [noise(1, 50, 40), noise(2, 33, 64)]


class EarlyFusionReference:
    """A checkpoint in PyTorch with its processor."""

    def __init__(self, folder: Path) -> None:
        registry.lookup("cm3leon")  # imports the zoo's model
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        found = AutoProcessor.from_pretrained(folder)
        known = isinstance(found, (ChameleonProcessor, JanusProcessor))
        self.processor = found if known else ChameleonProcessor.from_pretrained(folder)
        self.raw = isinstance(self.processor, JanusProcessor)  # Chameleon's processor writes more than it is given
        self.options = {} if self.raw else {"return_for_text_completion": self.processor.tokenizer.sep_token is None}

    def prompt(self, question: str, images: int) -> str:
        return self.processor.image_token * images + question

    def inputs(self, text: str, images) -> dict[str, torch.Tensor]:
        return dict(self.processor(text=text, images=list(images) or None, return_tensors="pt", **self.options))

    @torch.inference_mode()
    def generate(self, text: str, images) -> list[int]:
        inputs = self.inputs(text, images)
        out = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=NEW)
        return out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    made: dict[str, EarlyFusionReference] = {}

    def make(name: str) -> EarlyFusionReference:
        if name not in made:
            made[name] = EarlyFusionReference(tiny_checkpoint(name))
        return made[name]

    return make


@pytest.mark.parametrize("build", ["portable", "cpu-fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens(name, build, session, reference) -> None:
    vlm, model = session(name, build), reference(name)
    cases = [([picture], question) for picture, question in itertools.product(PICTURES, QUESTIONS)]
    cases += [(PICTURES, "compare both, please!"), (PICTURES[:1] * 2, "are they the same?"), ([], "how are you?")]
    answers = set()
    for images, question in cases:
        text = model.prompt(question, len(images))
        expected = model.generate(text, images)
        got = vlm.generate(text if model.raw else question, images=images, max_new_tokens=NEW, raw=model.raw)
        assert got.tokens == expected, (len(images), question)
        answers.add(tuple(expected))
    assert len(answers) > len(QUESTIONS)  # the pictures matter


@pytest.mark.parametrize("build", ["portable", "cpu-fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch(name, build, session, reference) -> None:
    vlm, model = session(name, build), reference(name)
    images = [[PICTURES[1]], PICTURES, []]
    texts = [model.prompt(question, len(own)) for question, own in zip(QUESTIONS, images, strict=False)]
    got = vlm.generate(texts if model.raw else QUESTIONS[:3], images=images, max_new_tokens=NEW, raw=model.raw)
    for one, text, own in zip(got, texts, images, strict=True):
        assert one.tokens == model.generate(text, own)


@pytest.mark.parametrize("build", ["portable", "cpu-fp32", "cpu-int4"])
@pytest.mark.parametrize("name", CODES)
def test_codes_are_the_tokenizers_own(name, build, session, reference) -> None:
    """Also in a quantised build, whose image tokenizer stays as it is."""
    vlm, model = session(name, build), reference(name)
    pictures = [noise(seed, 40 + seed, 60 - seed) for seed in range(3, 11)]
    with torch.inference_mode():
        pixels = torch.cat([model.inputs("<image>", [picture])["pixel_values"] for picture in pictures])
        expected = model.model.get_image_tokens(pixels)
    assert len(expected.unique()) > 8
    got = vlm.embed_image(pictures)
    np.testing.assert_array_equal(np.stack(got), expected.numpy())


@pytest.mark.parametrize("name", CODES)
def test_an_answer_names_no_image_token(name, session, reference) -> None:
    """Four bits answer, and no logit of theirs allows an image's token."""
    vlm, model = session(name, "cpu-int4"), reference(name)
    got = vlm.generate("what is it?", images=PICTURES[0], max_new_tokens=NEW, ignore_eos=True)
    images = model.model.model.vocabulary_mapping.image_tokens
    assert len(got.tokens) == NEW
    assert not set(got.tokens) & set(images)
    assert (vlm.logits_along("what is it?", PICTURES[0], got.tokens)[:, images] < -1e38).all()
