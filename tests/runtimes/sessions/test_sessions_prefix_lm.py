"""Models that see a prefix, or their images, in both directions: transformers' answers, alone, in batches and from caches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prefix_reference import PrefixReference
from session_pictures import noise

from vlm_edge_runtime import PromptError
from vlm_edge_runtime.sessions import prefill

NEW = 8
PROMPTS = [
    "what is in the picture?",
    "how many shapes are there?",
    "a cat",
    "describe this image, please.",
    "is it red?",
    "the dog ran after it; where is the cat on the mat?",
    "a",
    "two photos of the sea",
]
IMAGES = [noise(1, 50, 60), noise(2, 90, 40)]
FAST = ["git", "paligemma2", "simvlm", "gemma3"]
ALL = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in ("paligemma", "gemma3-narrow"))]
BUILDS = ["portable", "cpu-fp32"]
LOWERED = [pytest.param("portable", marks=pytest.mark.slow), "cpu-fp32"]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    made: dict[str, PrefixReference] = {}

    def make(name: str) -> PrefixReference:
        if name not in made:
            made[name] = PrefixReference(tiny_checkpoint(name))
        return made[name]

    return make


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", ALL)
def test_greedy_tokens(name, build, session, reference) -> None:
    """Eight prompts about each of two images; later prompts find the image, and what can be reused of it, in the caches."""
    vlm, model = session(name, build), reference(name)
    said = set()
    for image in IMAGES:
        for prompt in PROMPTS:
            expected = model.answer(prompt, [image], NEW)
            got = vlm.generate(prompt, images=image, max_new_tokens=NEW)
            assert got.tokens == expected, prompt
            said.add(tuple(expected))
    assert len(said) > 2  # the answers do depend on what was asked


@pytest.mark.parametrize("name", ALL)
def test_log_probabilities(name, session, reference) -> None:
    """Of every token, so that a small difference shows where the greedy choice would not."""
    vlm, model = session(name), reference(name)
    for prompt in PROMPTS[:3]:
        got = vlm.generate(prompt, images=IMAGES[0], max_new_tokens=5, logprobs=3, ignore_eos=True)
        inputs = model.inputs(prompt, IMAGES[:1])
        with torch.inference_mode():
            out = model.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=5,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
        expected = torch.stack(out.logits, 1)[0].log_softmax(-1).numpy()
        assert got.logprobs is not None
        np.testing.assert_allclose(got.logprobs, expected[np.arange(5), got.tokens], rtol=0, atol=1e-4)


@pytest.mark.parametrize("build", LOWERED)
@pytest.mark.parametrize("name", ALL)
def test_prefixes_of_different_lengths_in_a_batch(name, build, session, reference) -> None:
    """Every row says what it says alone, and what transformers says."""
    vlm, model = session(name, build), reference(name)
    rows = [(PROMPTS[5], IMAGES[0]), (PROMPTS[6], IMAGES[1]), (PROMPTS[0], IMAGES[0]), (PROMPTS[5], IMAGES[1])]
    together = vlm.generate([prompt for prompt, _ in rows], images=[image for _, image in rows], max_new_tokens=NEW)
    for (prompt, image), got in zip(rows, together, strict=True):
        assert got.tokens == model.answer(prompt, [image], NEW), prompt
        vlm.clear_caches()
        assert vlm.generate(prompt, images=image, max_new_tokens=NEW).tokens == got.tokens


@pytest.mark.parametrize("build", LOWERED)
@pytest.mark.parametrize(
    ("name", "reused"), [("git", "image"), ("gemma3", "image"), ("paligemma2", "nothing"), ("simvlm", "nothing")]
)
def test_a_prefix_is_reused_at_block_boundaries_only(name, reused, build, session, reference) -> None:
    """The image of GIT and Gemma 3 never sees the text, and is kept; that of PaliGemma and SimVLM does, and is run anew."""
    vlm, model = session(name, build), reference(name)
    image = IMAGES[0]
    for prompt in ("a photo of a cat", "a photo of a house, of a tree", "a photo", "a photo of a cat"):
        got = vlm.generate(prompt, images=image, max_new_tokens=NEW)
        assert got.tokens == model.answer(prompt, [image], NEW), prompt
        if prompt != "a photo of a cat":
            assert (vlm.stats.reused_tokens > 0) == (reused == "image"), prompt
    vlm.clear_caches()
    vlm.generate("a photo of a cat", images=IMAGES[1], max_new_tokens=2)
    got = vlm.generate("a photo of a cat", images=image, max_new_tokens=NEW)  # other picture, same words
    assert got.tokens == model.answer("a photo of a cat", [image], NEW)


@pytest.mark.parametrize("build", LOWERED)
def test_a_second_turn_about_the_same_image(build, session, reference) -> None:
    """Gemma 3: the answer and the new question come after an image that is in the cache, or all is run anew: the same answer."""
    vlm, model = session("gemma3", build), reference("gemma3")
    image = {"type": "image"}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": PROMPTS[0]}]}]
    first = vlm.generate(messages, images=[IMAGES[0]], max_new_tokens=NEW, ignore_eos=True)
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": [{"type": "text", "text": "and here?"}, image]},
    ]
    expected = model.generate(model.of_text(model.render(messages), IMAGES), NEW)
    second = vlm.generate(messages, images=IMAGES, max_new_tokens=NEW)
    assert second.tokens == expected
    assert vlm.stats.reused_tokens > 0
    vlm.clear_caches()
    assert vlm.generate(messages, images=IMAGES, max_new_tokens=NEW).tokens == expected
    assert vlm.stats.reused_tokens == 0


@pytest.mark.parametrize("build", LOWERED)
def test_several_images_and_none(build, session, reference) -> None:
    for name in ("gemma3", "paligemma2"):
        vlm, model = session(name, build), reference(name)
        for images in (IMAGES, [IMAGES[0]] * 2, [*IMAGES, IMAGES[0]]):
            got = vlm.generate(PROMPTS[0], images=images, max_new_tokens=NEW)
            assert got.tokens == model.answer(PROMPTS[0], images, NEW)
    vlm, model = session("gemma3", build), reference("gemma3")
    assert vlm.generate(PROMPTS[0], max_new_tokens=NEW).tokens == model.answer(PROMPTS[0], [], NEW)


def test_images_that_do_not_fit_are_refused(session) -> None:
    for name in ("paligemma2", "git", "simvlm"):
        with pytest.raises(PromptError, match="at least 1"):
            session(name).generate("a cat", max_new_tokens=1)
    for name in ("git", "simvlm"):
        with pytest.raises(PromptError, match="at most 1"):
            session(name).generate("a cat", images=IMAGES, max_new_tokens=1)


@pytest.mark.parametrize("build", LOWERED)
@pytest.mark.parametrize("name", FAST)
def test_a_prompt_in_pieces_keeps_its_blocks_whole(name, build, session, reference, monkeypatch) -> None:
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 3)
    vlm = session(name, build)
    for prompt in PROMPTS[:2]:
        got = vlm.generate(prompt, images=IMAGES[0], max_new_tokens=NEW)
        assert got.tokens == reference(name).answer(prompt, IMAGES[:1], NEW)


def test_git_describes_without_a_question(session, reference) -> None:
    """[CLS] alone after the image."""
    expected = reference("git").answer("", IMAGES[:1], NEW)
    assert session("git").generate("", images=IMAGES[0], max_new_tokens=NEW).tokens == expected


@pytest.mark.slow
@pytest.mark.parametrize("build", LOWERED)
def test_crops(build, session, tiny_checkpoint) -> None:
    """Pan and scan: the picture, then crops of it, each a block of its own."""
    scan = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": 3}
    model = PrefixReference(tiny_checkpoint("gemma3-crops"), **scan)
    vlm = session("gemma3-crops", build)
    for image in (noise(3, 100, 40), noise(4, 30, 95), noise(5, 50, 45)):
        for prompt in PROMPTS[:2]:
            assert vlm.generate(prompt, images=image, max_new_tokens=NEW).tokens == model.answer(prompt, [image], NEW)


@pytest.mark.parametrize("name", [*FAST[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in FAST[1:])])
def test_int4(name, session) -> None:
    """Blocks stay blocks with 4-bit weights: an answer comes, alone as in a batch."""
    vlm = session(name, "cpu-int4")
    alone = vlm.generate(PROMPTS[0], images=IMAGES[0], max_new_tokens=NEW, ignore_eos=True)
    assert len(alone.tokens) == NEW
    together = vlm.generate(PROMPTS[:2], images=IMAGES, max_new_tokens=NEW, ignore_eos=True)
    assert len(together[1].tokens) == NEW
