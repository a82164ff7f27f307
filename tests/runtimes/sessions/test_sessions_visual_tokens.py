"""MiniGPT-v2, Frozen and PaLM-E answer as their PyTorch models do, token for token; states and actions included."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from session_pictures import noise
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from vlm_edge.families import registry
from vlm_edge_runtime.errors import CapabilityError, PromptError

NEW = 8
QUESTIONS = ["what is in the picture?", "describe this image, please.", "how many shapes are there?", "is there a red circle?"]
PROMPTS = {
    "minigpt_v2": ("[INST] <Img>{}</Img> [vqa] {} [/INST]", "<ImageHere>"),
    "frozen": ("{}{}", "<image>"),
    "palm_e": ("Given {} Q: {} A:", "<image>"),
}
NAMES = ["palm_e", *(pytest.param(name, marks=pytest.mark.slow) for name in ("minigpt_v2", "frozen"))]


class ZooReference:
    """A zoo model with its tokenizer and image processor."""

    def __init__(self, folder: Path) -> None:
        registry.lookup(folder.name.split("-")[0])  # which imports the model
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.images = AutoImageProcessor.from_pretrained(folder, backend="pil")

    @torch.inference_mode()
    def generate(self, text: str, token: str, images, states=None) -> list[int]:
        given = {}
        if images:
            given["pixel_values"] = self.images(list(images), return_tensors="pt")["pixel_values"]
        if states:
            given["states"] = torch.from_numpy(np.stack(states))
        ids = self.tokenizer(text.replace(token, token * self.model.config.image_tokens), return_tensors="pt")["input_ids"]
        out = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, **given
        )
        return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    made: dict[str, ZooReference] = {}

    def make(name: str) -> ZooReference:
        if name not in made:
            made[name] = ZooReference(tiny_checkpoint(name))
        return made[name]

    return make


@pytest.mark.parametrize("build", ["portable", "cpu-fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens(name, build, session, reference) -> None:
    vlm, model = session(name, build), reference(name)
    frame, token = PROMPTS[name]
    pictures = [noise(1, 50, 40), noise(2, 33, 64)]
    cases = [([picture], question) for picture, question in itertools.product(pictures, QUESTIONS)]
    cases += [(pictures, "compare both, please!"), (pictures[:1] * 2, "are they the same?"), ([], "how are you?")]
    for images, question in cases:
        text = frame.format(token * len(images), question)
        got = vlm.generate(text, images=images, max_new_tokens=NEW, raw=True)
        assert got.tokens == model.generate(text, token, images), (len(images), question)


@pytest.mark.parametrize("build", ["portable", "cpu-fp32"])
def test_states_in_the_sentence(build, session, reference) -> None:
    """Several images and states in one prompt, in any order, and rows of a batch that have their own."""
    vlm, model = session("palm_e", build), reference("palm_e")
    states = [np.linspace(-1, 1, 6, dtype=np.float32), np.full(6, 0.3, np.float32)]
    image = noise(3, 40, 40)
    texts = [
        "Q: where is <state> near <state>? A:",
        "Given <state> <image> Q: what happened to <state>? A:",
        "Given <image>. Q: A:",
    ]
    given = [([], states), ([image], states[::-1]), ([image], [])]
    expected = [model.generate(text, "<image>", images, own) for text, (images, own) in zip(texts, given, strict=True)]
    for text, (images, own), tokens in zip(texts, given, expected, strict=True):
        assert vlm.generate(text, images=images, states=own, max_new_tokens=NEW, raw=True).tokens == tokens
    rows = vlm.generate(
        texts, images=[images for images, _ in given], states=[own for _, own in given], max_new_tokens=NEW, raw=True
    )
    assert [row.tokens for row in rows] == expected
    assert expected[0] != model.generate(texts[0], "<image>", [], states[::-1]), "the states' order must make a difference"


def test_messages_with_states(session, reference) -> None:
    vlm, state = session("palm_e", "portable"), np.arange(6, dtype=np.float32)
    content = [{"type": "state"}, {"type": "text", "text": "what is to be done?"}]
    got = vlm.generate([{"role": "user", "content": content}], states=[state], max_new_tokens=NEW)
    text = "USER: <state>what is to be done?\nASSISTANT:"
    assert got.tokens == reference("palm_e").generate(text, "<image>", [], [state])


def test_actions(session) -> None:
    vlm = session("palm_e", "portable")
    rule = vlm.manifest.contract.actions
    found = vlm.decode_actions([rule.first_token, rule.first_token + 1, rule.first_token + rule.bins - 1, 3])
    width = (np.array(rule.high) - rule.low) / rule.bins
    np.testing.assert_allclose(found, [np.array(rule.low) + width * [0.5, 1.5, rule.bins - 0.5]], rtol=0, atol=1e-6)
    with pytest.raises(PromptError, match="state input must be numbers of shape"):
        vlm.generate("<state>", states=[np.zeros(5, np.float32)], max_new_tokens=1)
    with pytest.raises(CapabilityError, match="no action tokens"):
        session("llava-llama", "portable").decode_actions([1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minigpt_v2", "frozen", "palm_e"])
def test_four_bits(name, session) -> None:
    frame, token = PROMPTS[name]
    text = frame.format(token, "what is it?")
    got = session(name, "cpu-int4").generate(text, images=noise(4, 40, 40), max_new_tokens=NEW, ignore_eos=True, raw=True)
    assert len(got.tokens) == NEW
