"""BLIP, vision encoder-decoders, Florence-2, Pix2Struct in the runtime: token for token what transformers' `generate` says."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from vlm_edge_runtime.errors import PromptError

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
slow = pytest.mark.slow
READERS = ["blip-caption", "vit-gpt2", "donut-mbart", "pix2struct"]
"""Whose decoder reads the prompt, and may do without one."""
ANSWERERS = ["blip-vqa", "florence2"]
"""Whose encoder reads the prompt."""
MORE = [
    pytest.param(name, marks=slow)
    for name in ("vit-gpt2-scaled", "vit-bert", "deit-roberta", "deit-trocr", "vit-trocr-sines", "vit-bart", "florence2-scaled")
]
SAYING: dict[str, dict[str, Any]] = {"blip-vqa": {"no_repeat_ngram_size": 1}}
"""With random weights this one says one word again and again, whatever it reads; not allowed to, it says what it read."""
_CLASSES = {"blip-caption": "BlipForConditionalGeneration", "blip-vqa": "BlipForQuestionAnswering"}


class Reference:
    """transformers' model, tokenizer and processor of a checkpoint, float32."""

    def __init__(self, name: str, folder: Path) -> None:
        kind = getattr(transformers, _CLASSES.get(name, "AutoModelForImageTextToText"))
        self.model: Any = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        for module in self.model.modules():
            # transformers 5.23 loads TrOCR's table of sines without its numbers, and cannot generate then.
            if type(module).__name__ == "TrOCRSinusoidalPositionalEmbedding":
                module.weights = module.get_embedding(module.weights.shape[0], module.embedding_dim, module.padding_idx)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.images = transformers.AutoImageProcessor.from_pretrained(folder)
        self.folder = folder

    @torch.no_grad()
    def answer(self, prompt: str, picture: Image.Image, **options: Any) -> list[int]:
        """Greedy new tokens."""
        made = self.model.generate(
            **self.inputs(prompt, picture), **{"do_sample": False, "num_beams": 1, "max_new_tokens": NEW, **options}
        )
        return made[0, self.before(prompt) :].tolist()

    def inputs(self, prompt: str, picture: Image.Image) -> dict[str, Any]:
        if type(self.model).__name__.startswith(("Blip", "Florence")):
            processor = transformers.AutoProcessor.from_pretrained(self.folder)
            return dict(processor(images=picture, text=prompt or None, return_tensors="pt"))
        inputs = dict(self.images(picture, return_tensors="pt"))
        if prompt:
            inputs["decoder_input_ids"] = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return inputs

    def before(self, prompt: str) -> int:
        """Tokens that `generate` gives back in front of the new ones."""
        if type(self.model).__name__.startswith(("Florence", "BlipForQuestion")) or not prompt:
            return 1
        tokens = len(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        donut = "donut" in str(getattr(getattr(self.model.config, "encoder", None), "model_type", ""))
        return tokens if donut else tokens + 1


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    random = np.random.default_rng(3)
    return [Image.fromarray(random.integers(0, 256, size).astype(np.uint8)) for size in ((40, 90, 3), (70, 33, 3))]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Reference]:
    made: dict[str, Reference] = {}

    def make(name: str) -> Reference:
        if name not in made:
            made[name] = Reference(name, tiny_checkpoint(name))
        return made[name]

    return make


@pytest.mark.parametrize("build", ["portable", "cpu-fp32"])
@pytest.mark.parametrize("name", [*READERS, *ANSWERERS, *MORE])
def test_prompts_and_pictures(name: str, build: str, session: Any, reference: Any, pictures: list[Image.Image]) -> None:
    vlm, model = session(name, build), reference(name)
    answers: list[list[int]] = []
    for prompt, picture in product(PROMPTS, pictures):
        found = vlm.generate(prompt, [picture], temperature=0.0, max_new_tokens=NEW, **SAYING.get(name, {}))
        assert found.tokens == model.answer(prompt, picture, **SAYING.get(name, {})), prompt
        answers.append(found.tokens)
    # What is read shows in what is said: the prompt, and the picture.
    assert len({tuple(answer) for answer in answers}) > len(pictures) + 1
    assert any(one != other for one, other in zip(answers[::2], answers[1::2], strict=True))


@pytest.mark.parametrize("build", ["portable", "cpu-fp32"])
@pytest.mark.parametrize("name", READERS)
def test_without_a_prompt(name: str, build: str, session: Any, reference: Any, pictures: list[Image.Image]) -> None:
    vlm, model = session(name, build), reference(name)
    for picture in pictures:
        assert vlm.generate("", [picture], temperature=0.0, max_new_tokens=NEW).tokens == model.answer("", picture)


@pytest.mark.parametrize("build", ["portable", "cpu-fp32"])
@pytest.mark.parametrize("name", [*READERS, *ANSWERERS])
def test_a_batch_of_unlike_rows(name: str, build: str, session: Any, reference: Any, pictures: list[Image.Image]) -> None:
    """Prompts and, where the source is not of one size, sources of unlike length: each row as if it were alone."""
    vlm, model = session(name, build), reference(name)
    rows = [("a red circle left of a blue square, and", pictures[0]), ("x", pictures[1]), ("is it red", pictures[0])]
    prompts, images, more = [prompt for prompt, _ in rows], [[picture] for _, picture in rows], SAYING.get(name, {})
    together = vlm.generate(prompts, images, temperature=0.0, max_new_tokens=NEW, **more)
    assert [one.tokens for one in together] == [model.answer(prompt, picture, **more) for prompt, picture in rows]


@pytest.mark.parametrize("name", [*READERS, *ANSWERERS])
def test_four_bit_build_generates(name: str, session: Any, pictures: list[Image.Image]) -> None:
    found = session(name, "cpu-int4").generate("a photo of", [pictures[0]], temperature=0.0, max_new_tokens=NEW, ignore_eos=True)
    assert len(found.tokens) == NEW


@pytest.mark.parametrize("name", ["blip-caption", "florence2", "vit-gpt2"])
def test_beams(name: str, session: Any, reference: Any, pictures: list[Image.Image]) -> None:
    vlm, model = session(name), reference(name)
    for prompt in PROMPTS[:3]:
        found = vlm.generate(prompt, [pictures[0]], temperature=0.0, num_beams=3, max_new_tokens=NEW)
        assert found.tokens == model.answer(prompt, pictures[0], num_beams=3), prompt


def test_a_second_question_about_a_picture_reads_it_once(session: Any, pictures: list[Image.Image]) -> None:
    vlm = session("blip-vqa")
    vlm.generate("what is it?", [pictures[0]], temperature=0.0, max_new_tokens=NEW)
    vlm.generate("is it red", [pictures[0]], temperature=0.0, max_new_tokens=NEW)
    assert vlm.stats.image_cache_misses == 0


def test_task_words_become_sentences(session: Any, reference: Any, pictures: list[Image.Image]) -> None:
    vlm, model = session("florence2"), reference("florence2")
    for prompt in ("<CAPTION>", "<OD>", "<REGION_TO_OCR><loc_1><loc_2>", "<OPEN_VOCABULARY_DETECTION> a red circle "):
        found = vlm.generate(prompt, [pictures[0]], temperature=0.0, max_new_tokens=NEW)
        assert found.tokens == model.answer(prompt, pictures[0]), prompt
    assert vlm.prepare("<CAPTION>", [pictures[0]]).token_ids == model.inputs("<CAPTION>", pictures[0])["input_ids"][0].tolist()
    with pytest.raises(PromptError, match="takes no further text"):
        vlm.generate("<CAPTION> and more", [pictures[0]])


@pytest.mark.parametrize("name", ["blip-caption", "florence2"])
def test_a_picture_is_needed(name: str, session: Any, pictures: list[Image.Image]) -> None:
    with pytest.raises(PromptError, match="at least 1 images"):
        session(name).generate("a photo of")
    with pytest.raises(PromptError, match="at most 1 images"):
        session(name).generate("a photo of", pictures)
