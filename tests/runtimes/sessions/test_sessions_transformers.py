"""Greedy answers are transformers' answers, token for token: portable graphs and the fp32 build."""

from __future__ import annotations

import numpy as np
import pytest
from session_pictures import noise
from transformers_reference import Reference

NEW = 10
SAID = {"type": "text", "text": "what is in the picture?"}


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    made: dict[str, Reference] = {}

    def make(name: str) -> Reference:
        if name not in made:
            made[name] = Reference(tiny_checkpoint(name))
        return made[name]

    return make


CASES = {
    "one image": ([SAID], [0]),
    "two images": ([SAID], [1, 2]),
    "no image": ([SAID], []),
    "the same image twice": ([SAID], [3, 3]),
    "image in the middle": ([SAID, {"type": "image"}, {"type": "text", "text": "and what is in this one?"}], [4, 5]),
}


@pytest.mark.parametrize("build", ["portable", "cpu-fp32"])
@pytest.mark.parametrize("name", ["llava-llama", "smolvlm", "qwen2_vl"])
def test_greedy_tokens(name, build, session, reference) -> None:
    vlm, model = session(name, build), reference(name)
    for case, (parts, seeds) in CASES.items():
        images = [noise(seed, 40 + 25 * seed, 60) for seed in seeds]
        before = len(images) - sum(part["type"] == "image" for part in parts)
        content = [{"type": "image"}] * before + parts
        messages = [{"role": "user", "content": content}]
        text = model.render(messages)
        expected = model.generate(text, images, NEW)
        got = vlm.generate(messages, images=images, max_new_tokens=NEW)
        assert got.tokens == expected, case
        assert got.text == model.tokenizer.decode(expected, skip_special_tokens=True), case
        assert got.finish_reason == ("stop" if expected[-1] in _ends(model) else "length"), case
        assert got.prompt_tokens == model.inputs(text, images)["input_ids"].shape[1], case


@pytest.mark.parametrize("name", ["llava-llama", "smolvlm", "qwen2_vl"])
def test_plain_prompt_is_a_user_message_after_its_images(name, session, reference) -> None:
    vlm, model = session(name), reference(name)
    image = noise(9)
    text = model.render([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}])
    expected = model.generate(text, [image], NEW)
    assert vlm.generate("what is it?", images=image, max_new_tokens=NEW).tokens == expected
    assert vlm.generate(text, images=[image], max_new_tokens=NEW).tokens == expected
    assert vlm.generate(text, images=[image], raw=True, max_new_tokens=NEW).tokens == expected


@pytest.mark.parametrize("name", ["llava-llama", "smolvlm", "qwen2_vl"])
def test_log_probabilities(name, session, reference) -> None:
    vlm, model = session(name), reference(name)
    image = noise(11)
    got = vlm.generate("what is it?", images=image, max_new_tokens=6, logprobs=3, ignore_eos=True)
    text = model.render([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}])
    expected = model.logprobs(text, [image], got.tokens).numpy()
    assert got.logprobs is not None
    assert got.top_logprobs is not None
    chosen = expected[np.arange(6), got.tokens]
    np.testing.assert_allclose(got.logprobs, chosen, rtol=0, atol=1e-4)
    for row, top in zip(expected, got.top_logprobs, strict=True):
        np.testing.assert_allclose([logprob for _, logprob in top], np.sort(row)[::-1][:3], rtol=0, atol=1e-4)
        np.testing.assert_allclose([row[token] for token, _ in top], np.sort(row)[::-1][:3], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llava-llama", "qwen2_vl"])
def test_repetition_penalty(name, session, reference) -> None:
    vlm, model = session(name), reference(name)
    image = noise(12)
    text = model.render([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a cat"}]}])
    expected = model.generate(text, [image], NEW, repetition_penalty=1.7)
    assert vlm.generate("a cat", images=image, max_new_tokens=NEW, repetition_penalty=1.7).tokens == expected


def _ends(model: Reference) -> list[int]:
    ends = model.model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]
