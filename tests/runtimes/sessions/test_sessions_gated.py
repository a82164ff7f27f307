"""IDEFICS and Llama 3.2 Vision in the runtime: token for token what transformers' `generate` answers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm_edge_runtime import load
from vlm_edge_runtime.sessions.media_rules import MediaTokens, last_medium

PROMPTS = (
    "What is in the picture?",
    "Describe this image.",
    "How many shapes are there?",
    "a photo of",
    "two cats, and",
    "is it red",
    "x",
    "The dog ran after it! What else?",
)
NEW = 10
FENCED = "<fake_token_around_image><image><fake_token_around_image>"
MARKS = {"idefics": FENCED, "idefics-plain": FENCED, "mllama": "<|image|>"}
NAMES = ["idefics", "mllama", pytest.param("idefics-plain", marks=pytest.mark.slow)]


class Reference:
    """transformers' model and processor; prompts are written out with their image tokens."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor: Any = AutoProcessor.from_pretrained(folder)

    def answer(self, text: str, images: list[Image.Image], mark: str) -> list[int]:
        if type(self.processor).__name__ == "IdeficsProcessor":
            parts: list[Any] = []
            left = list(images)
            for number, piece in enumerate(text.split(mark)):
                parts += [left.pop(0)] if number else []
                parts += [piece] if piece else []
            inputs = self.processor(text=parts, return_tensors="pt")
        else:
            inputs = self.processor(text=text, images=images or None, return_tensors="pt")
        with torch.no_grad():
            made = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=NEW)
        return made[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    random = np.random.default_rng(3)
    return [Image.fromarray(random.integers(0, 256, size).astype(np.uint8)) for size in ((40, 90, 3), (70, 33, 3))]


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, tiny_checkpoint: Any, portable_bundle: Any) -> Iterator[tuple[str, Any, Reference]]:
    name = request.param
    with load(portable_bundle(name), build="portable") as session:
        yield name, session, Reference(tiny_checkpoint(name))


def test_prompts_and_pictures(pair: Any, pictures: list[Image.Image]) -> None:
    name, session, reference = pair
    for prompt, picture in product(PROMPTS, pictures):
        found = session.generate(prompt, [picture], temperature=0.0, max_new_tokens=NEW)
        assert found.tokens == reference.answer(MARKS[name] + prompt, [picture], MARKS[name]), prompt


def test_a_batch_of_unlike_rows(pair: Any, pictures: list[Image.Image]) -> None:
    """Two pictures, none, one: each row as if it were alone."""
    _, session, _ = pair
    rows = [("Compare both.", pictures), ("a house and", []), ("Describe it.", pictures[:1])]
    alone = [session.generate(prompt, images, temperature=0.0, max_new_tokens=NEW).tokens for prompt, images in rows]
    session.clear_caches()
    together = session.generate(
        [prompt for prompt, _ in rows], [images or None for _, images in rows], temperature=0.0, max_new_tokens=NEW
    )
    assert [one.tokens for one in together] == alone


def test_text_alone(pair: Any) -> None:
    name, session, reference = pair
    found = session.generate("a house and a tree,", temperature=0.0, max_new_tokens=NEW)
    assert found.tokens == reference.answer("a house and a tree,", [], MARKS[name])


def test_pictures_among_the_text(pair: Any, pictures: list[Image.Image]) -> None:
    """Few-shot prompts: a picture, its text, another picture; a picture in the middle; two in a row; the same one twice."""
    name, session, reference = pair
    mark, (first, second) = MARKS[name], pictures
    for text, images in [
        (f"{mark}a red circle. {mark}a", [first, second]),
        (f"What is this: {mark} in words?", [second]),
        (f"{mark}{mark}Compare both.", [first, second]),
        (f"{mark}one {mark}two {mark}three", [first, second, first]),
    ]:
        written = _as_processed(text, mark, name)
        found = session.generate(written, images, raw=True, temperature=0.0, max_new_tokens=NEW)
        assert found.tokens == reference.answer(text, images, mark), text


def _as_processed(text: str, mark: str, name: str) -> str:
    """What the model's processor makes of the text before it tokenises; a raw prompt is taken as it is."""
    if name == "mllama":
        rest, leading = text, ""
        while rest.startswith(mark):
            rest, leading = rest.removeprefix(mark), leading + mark
        return f"<s>{leading}<s>{rest}"
    pieces = [piece.strip(" ") for piece in text.split(mark)]
    return "<s>" + "<image>".join(pieces)


def test_a_second_turn_reuses_pictures_and_entries(pair: Any, pictures: list[Image.Image]) -> None:
    _, session, _ = pair
    session.clear_caches()
    first = session.generate("Describe this image.", pictures[:1], temperature=0.0, max_new_tokens=NEW)
    again = session.generate("Describe this image.", pictures[:1], temperature=0.0, max_new_tokens=NEW)
    assert again.tokens == first.tokens
    assert session.stats.image_cache_misses == 0 and session.stats.reused_tokens > 0
    other = session.generate("Describe this image.", pictures[1:], temperature=0.0, max_new_tokens=NEW)
    session.clear_caches()
    assert other.tokens == session.generate("Describe this image.", pictures[1:], temperature=0.0, max_new_tokens=NEW).tokens


def test_nothing_is_seen_after_the_end_of_a_text() -> None:
    ids = np.array([2, 7, 9, 3, 9, 7, 9, 9])
    rule = last_medium(MediaTokens(ids, [None, None], [np.array([1]), np.array([5])], ("images",), end=3))  # type: ignore[list-item]
    assert rule.argmax(1).tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert rule.sum(1).tolist() == [0, 1, 1, 1, 0, 1, 1, 1]
