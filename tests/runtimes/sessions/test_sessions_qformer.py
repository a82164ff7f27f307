"""BLIP-2, MiniGPT-4, InstructBLIP, InstructBLIP-Video, X-InstructBLIP: PyTorch's answers, alone, batched, from caches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qformer_reference import QFormerReference, XReference
from session_pictures import noise

NEW = 8
PROMPTS = [
    "what is in the picture?",
    "how many shapes are there?",
    "a cat",
    "describe this image, please.",
    "is it red?",
    "the dog ran after it; where is the cat on the mat?",
    "",
    "Question: two photos of the sea Answer:",
]
IMAGES = [noise(1, 50, 60), noise(2, 90, 40)]
VIDEOS = [[noise(10 + i, 40, 60) for i in range(4)], [noise(20 + i, 70, 30) for i in range(4)]]
FAST = ["blip2-opt", "blip2-t5", "instructblip-llama", "instructblipvideo"]
SLOW = ["minigpt4", "blip2-gpt2", "blip2-qwen2", "instructblip-opt", "instructblip-t5"]
ALL = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
INSTRUCTED = ["instructblip-llama", "instructblipvideo", pytest.param("instructblip-t5", marks=pytest.mark.slow)]
BUILDS = ["portable", "cpu-fp32"]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    made: dict[str, QFormerReference] = {}

    def make(name: str) -> QFormerReference:
        if name not in made:
            made[name] = QFormerReference(tiny_checkpoint(name))
        return made[name]

    return make


def given(model: QFormerReference) -> tuple[list, str]:
    """What the model looks at, and the argument that it is passed as."""
    return (VIDEOS, "videos") if model.takes_videos else (IMAGES, "images")


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", ALL)
def test_greedy_tokens(name, build, session, reference) -> None:
    """Eight prompts about each of two inputs; later prompts find features, and what can be reused of them, in the caches."""
    vlm, model = session(name, build), reference(name)
    inputs, argument = given(model)
    said = set()
    for one in inputs:
        for prompt in PROMPTS:
            (expected,) = model.generate([prompt], [one], NEW)
            got = vlm.generate(prompt, **{argument: one}, max_new_tokens=NEW)
            assert got.tokens == expected, prompt
            assert got.prompt_tokens == model.inputs([prompt], [one])["input_ids"].shape[1] + model.reads_source
            said.add(tuple(expected))
    assert len(said) > 4  # the answers do depend on what was asked


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", ALL)
def test_batch(name, build, session, reference) -> None:
    """Prompts of unlike length: padded on the left for the decoder, on the right for the Q-Former and an encoder."""
    vlm, model = session(name, build), reference(name)
    inputs, argument = given(model)
    rows = [(PROMPTS[5], inputs[0]), (PROMPTS[2], inputs[1]), (PROMPTS[3], inputs[0])]
    expected = model.generate([prompt for prompt, _ in rows], [one for _, one in rows], NEW)
    found = vlm.generate([prompt for prompt, _ in rows], **{argument: [one for _, one in rows]}, max_new_tokens=NEW)
    assert [one.tokens for one in found] == expected


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", ALL)
def test_log_probabilities(name, build, session, reference) -> None:
    """Of every token, so that a small difference shows where the greedy choice would not."""
    vlm, model = session(name, build), reference(name)
    inputs, argument = given(model)
    got = vlm.generate(PROMPTS[0], **{argument: inputs[0]}, max_new_tokens=5, logprobs=4, ignore_eos=True)
    expected = model.logprobs(PROMPTS[0], inputs[0], got.tokens)
    np.testing.assert_allclose(got.logprobs, expected[np.arange(5), got.tokens], rtol=0, atol=1e-4)
    for row, top in zip(expected, got.top_logprobs, strict=True):
        np.testing.assert_allclose([row[token] for token, _ in top], np.sort(row)[::-1][:4], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", INSTRUCTED)
def test_features_depend_on_the_instruction(name, session, reference) -> None:
    """The same image asked about in other words is encoded again; asked in the same words it is found in the cache."""
    vlm, model = session(name, "portable"), reference(name)
    inputs, argument = given(model)
    vlm.generate(PROMPTS[0], **{argument: inputs[0]}, max_new_tokens=2)
    assert vlm.stats.image_cache_misses == 1
    vlm.generate(PROMPTS[1], **{argument: inputs[0]}, max_new_tokens=2)
    assert vlm.stats.image_cache_misses == 1
    vlm.clear_caches()
    for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[0]):
        (expected,) = model.generate([prompt], [inputs[0]], NEW)
        assert vlm.generate(prompt, **{argument: inputs[0]}, max_new_tokens=NEW).tokens == expected


@pytest.mark.parametrize("name", ["blip2-opt", "instructblip-llama", "blip2-t5"])
def test_two_images_and_none(name, session, reference) -> None:
    """What the processors do not write, but the models run: tokens of two images in a row, and text alone."""
    vlm, model = session(name, "portable"), reference(name)
    inputs = model.inputs([PROMPTS[0]], [IMAGES[0]])
    other = model.inputs([PROMPTS[0]], [IMAGES[1]])
    tokens = model.model.config.num_query_tokens
    for key in ("input_ids", "attention_mask"):
        inputs[key] = torch.cat([inputs[key][:, :tokens], inputs[key]], 1)
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"], other["pixel_values"]])
    for key in ("qformer_input_ids", "qformer_attention_mask"):
        if key in inputs:
            inputs[key] = inputs[key].repeat(2, 1)
    greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW}
    with torch.inference_mode():
        found = model.model.generate(**inputs, **greedy)[:, 1 if model.reads_source else inputs["input_ids"].shape[1] :]
        alone = model.tokenizer(PROMPTS[0], return_tensors="pt")
        language = model.model.language_model
        text = language.generate(input_ids=alone["input_ids"], attention_mask=alone["attention_mask"], **greedy)
    expected = model._answer(found[0].tolist())
    assert vlm.generate(PROMPTS[0], images=IMAGES, max_new_tokens=NEW).tokens == expected
    text = text[:, 1 if model.reads_source else alone["input_ids"].shape[1] :]
    assert vlm.generate(PROMPTS[0], max_new_tokens=NEW).tokens == model._answer(text[0].tolist())


def test_a_long_video_is_sampled(session, reference) -> None:
    vlm, model = session("instructblipvideo", "portable"), reference("instructblipvideo")
    frames = [noise(30 + i, 40, 40) for i in range(11)]
    chosen = [frames[index] for index in (0, 2, 5, 8)]
    (expected,) = model.generate([PROMPTS[0]], [chosen], NEW)
    assert vlm.generate(PROMPTS[0], videos=frames, max_new_tokens=NEW).tokens == expected
    assert (
        vlm.generate(PROMPTS[0], videos=np.stack([np.asarray(frame) for frame in chosen]), max_new_tokens=NEW).tokens == expected
    )


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
def test_beams_and_repetition(name, session, reference) -> None:
    vlm, model = session(name, "portable"), reference(name)
    for options in ({"num_beams": 3}, {"repetition_penalty": 1.5}):
        (expected,) = model.generate([PROMPTS[0]], [IMAGES[0]], NEW, **options)
        assert vlm.generate(PROMPTS[0], images=IMAGES[0], max_new_tokens=NEW, **options).tokens == expected, options


@pytest.mark.parametrize("name", ALL)
def test_int4_writes(name, session) -> None:
    vlm = session(name, "cpu-int4")
    argument = {"videos": VIDEOS[0]} if "video" in name else {"images": IMAGES[0]}
    got = vlm.generate(PROMPTS[0], **argument, max_new_tokens=NEW, ignore_eos=True)
    assert len(got.tokens) == NEW


@pytest.fixture(scope="module")
def x_reference(tiny_checkpoint):
    return XReference(tiny_checkpoint("x_instructblip"))


CLIPS = [np.random.default_rng(40 + i).standard_normal((7 + 4 * i, 24)).astype(np.float32) for i in range(2)]
HEARD = {
    "both": (IMAGES[:1], CLIPS[:1]),
    "image alone": (IMAGES[1:], []),
    "audio alone": ([], CLIPS[1:]),
    "neither": ([], []),
    "two of each": (IMAGES, CLIPS),
}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("heard", HEARD)
def test_images_and_audio(heard, build, session, x_reference) -> None:
    """X-InstructBLIP: eight prompts, with a cue before each input, in the order images, audio."""
    vlm, (images, clips) = session("x_instructblip", build), HEARD[heard]
    for prompt in filter(None, PROMPTS):
        expected = x_reference.generate(prompt, images, clips, NEW)
        got = vlm.generate(prompt, images=images, audio=clips, max_new_tokens=NEW)
        assert got.tokens == expected, prompt


@pytest.mark.parametrize("build", BUILDS)
def test_images_and_audio_in_a_batch(build, session, x_reference) -> None:
    vlm = session("x_instructblip", build)
    rows = [(PROMPTS[0], HEARD["both"]), (PROMPTS[5], HEARD["audio alone"]), (PROMPTS[2], HEARD["image alone"])]
    expected = [x_reference.generate(prompt, *heard, NEW) for prompt, heard in rows]
    images, clips = [list(heard[0]) for _, heard in rows], [list(heard[1]) for _, heard in rows]
    found = vlm.generate([prompt for prompt, _ in rows], images=images, audio=clips, max_new_tokens=NEW)
    assert [one.tokens for one in found] == expected


def test_images_and_audio_at_int4(session) -> None:
    got = session("x_instructblip", "cpu-int4").generate(
        PROMPTS[0], images=IMAGES[0], audio=CLIPS[0], max_new_tokens=NEW, ignore_eos=True
    )
    assert len(got.tokens) == NEW
