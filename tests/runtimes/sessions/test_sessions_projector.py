"""Greedy answers about images of odd sizes are transformers' answers, token for token: tiles, padding, windows, rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from any_size_reference import AnySizeReference
from PIL import Image

from vlm_edge_runtime.bundle.vision_layout import InterpolationGeometry, WindowGeometry
from vlm_edge_runtime.sessions import packing

NEW = 8
PROMPTS = [
    "what is in the picture?",
    "describe this image, please.",
    "how many shapes are there?",
    "is there a red circle?",
    "a photo of",
    "Question: what is left of the blue square? Answer:",
    "what colour is it",
    "compare both halves, please!",
]
SIZES = [(37, 95), (130, 41)]
"""(height, width): tiles beside and above each other, with padding; windows that are cut off."""
FAST = ["llava_next", "qwen2_5_vl", "qwen3_vl"]
SLOW = [
    "llava_next-siglip",
    "llava_onevision",
    "internvl",
    "internvl-qwen3",
    "aya_vision",
    "cohere2_vision",
    "pixtral",
    "mistral3",
    "lighton_ocr",
]
NAMES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    made: dict[str, AnySizeReference] = {}

    def make(name: str) -> AnySizeReference:
        if name not in made:
            made[name] = AnySizeReference(tiny_checkpoint(name))
        return made[name]

    return make


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Blocks of colour and noise: what stands where makes a difference."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)).astype(np.int16)
    return Image.fromarray((image + generator.integers(-20, 20, image.shape)).clip(0, 255).astype(np.uint8))


def asked(prompt: str, images: int) -> list[dict[str, object]]:
    """A user's message: the images before the text, all but the first in the middle."""
    parts = [{"type": "image"}, {"type": "text", "text": prompt}] if images else [{"type": "text", "text": prompt}]
    for _ in range(images - 1):
        parts += [{"type": "image"}, {"type": "text", "text": "and in this one?"}]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize("build", ["portable", "cpu-fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens(name, build, session, reference) -> None:
    vlm, model = session(name, build), reference(name)
    pictures = [picture(seed, *size) for seed, size in enumerate(SIZES)]
    cases = [(asked(prompt, 1), [image]) for prompt, image in itertools.product(PROMPTS, pictures)]
    cases += [(asked(PROMPTS[0], 2), pictures), (asked(PROMPTS[1], 2), pictures[:1] * 2), (asked(PROMPTS[2], 0), [])]
    if build == "cpu-fp32":
        cases = cases[::4] + cases[-3:]
    for messages, images in cases:
        text = model.render(messages)
        expected = model.generate(text, images, NEW)
        got = vlm.generate(messages, images=images, max_new_tokens=NEW)
        assert got.tokens == expected, (text, len(images))
        assert got.prompt_tokens == model.inputs(text, images)["input_ids"].shape[1], text


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_have_images_of_their_own(name, session, reference) -> None:
    vlm, model = session(name), reference(name)
    prompts = [asked(PROMPTS[0], 1), asked(PROMPTS[1], 2), asked(PROMPTS[2], 0)]
    images = [[picture(3, 60, 33)], [picture(4, 50, 90), picture(5, 33, 33)], []]
    got = vlm.generate(prompts, images=images, max_new_tokens=NEW)
    for one, prompt, own in zip(got, prompts, images, strict=True):
        assert one.tokens == model.generate(model.render(prompt), own, NEW)


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_prefix_ends_inside_an_image(name, session, reference) -> None:
    """The same image with another question: the prefix that is kept, features and all, gives the same answer."""
    vlm, model = session(name), reference(name)
    image = picture(6, 77, 52)
    for prompt in PROMPTS[:3]:
        got = vlm.generate(asked(prompt, 1), images=[image], max_new_tokens=NEW)
        assert got.tokens == model.generate(model.render(asked(prompt, 1)), [image], NEW)
    assert vlm.stats.image_cache_misses == 0
    assert vlm.stats.reused_tokens > 0


PLANTED = {
    "qwen2_5_vl": (WindowGeometry, "window_ids", np.zeros_like),
    "qwen3_vl": (InterpolationGeometry, "interpolation_weights", lambda weights: np.roll(weights, 1, axis=0)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_in_the_geometry_shows(name, session, monkeypatch) -> None:
    """Patches that see the whole picture, or positions that are one patch off, give other numbers than the right ones."""
    kind, array, spoil = PLANTED[name]
    right = packing._GEOMETRY[kind]

    def wrong(rule, height: int, width: int):
        arrays = right(rule, height, width)
        return {**arrays, array: spoil(arrays[array])}

    def answer() -> list[float]:
        vlm = session(name, "portable")  # with empty caches
        given = {"images": [picture(8, 80, 60)], "max_new_tokens": 3, "logprobs": 0, "ignore_eos": True}
        return vlm.generate(asked(PROMPTS[0], 1), **given).logprobs

    before = answer()
    monkeypatch.setitem(packing._GEOMETRY, kind, wrong)
    assert np.abs(np.subtract(answer(), before)).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_four_bits(name, session) -> None:
    got = session(name, "cpu-int4").generate("what is it?", images=picture(7, 64, 48), max_new_tokens=NEW, ignore_eos=True)
    assert len(got.tokens) == NEW
