"""VisualGPT, CoCa, Show-Attend-Tell in the runtime: what `generate` says token for token, the same vectors and attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from PIL import Image

from vlm_edge_runtime import CapabilityError, ContextLengthError, ContrastiveCaptioner, VisionLanguageModel
from vlm_edge_runtime.errors import PromptError

PROMPTS = ("", "What is in the picture?", "a photo of", "two cats, and", "is it red", "x", "Describe this image.", "the dog ran")
TEXTS = ["a photo of a cat", "a dog", "two photos of the sea, of a house"]
NEW, START = 10, 2
NAMES = ["visual_gpt", "coca", "show_attend_tell"]


class Reference:
    """The model itself, with tokenizer and image processor."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.images = transformers.AutoImageProcessor.from_pretrained(folder)

    def ids(self, prompt: str) -> torch.Tensor:
        words = self.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        return torch.tensor([[START, *words]], dtype=torch.long)

    def pixels(self, *pictures: Image.Image) -> torch.Tensor:
        found: torch.Tensor = self.images(list(pictures), return_tensors="pt")["pixel_values"]
        return found

    @torch.no_grad()
    def answer(self, prompt: str, picture: Image.Image, **options: Any) -> list[int]:
        ids = self.ids(prompt)
        name = "decoder_input_ids" if hasattr(self.model.config, "decoder") else "input_ids"
        options = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW, **options}
        found: list[int] = self.model.generate(pixel_values=self.pixels(picture), **{name: ids}, **options)[0].tolist()
        return found[ids.shape[1] :]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    random = np.random.default_rng(3)
    return [Image.fromarray(random.integers(0, 256, size).astype(np.uint8)) for size in ((40, 90, 3), (70, 33, 3))]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Reference]:
    made: dict[str, Reference] = {}

    def make(name: str) -> Reference:
        if name not in made:
            made[name] = Reference(tiny_checkpoint(name))
        return made[name]

    return make


@pytest.mark.parametrize("build", ["portable", "cpu-fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_captions(name: str, build: str, session: Any, reference: Any, pictures: list[Image.Image]) -> None:
    vlm, model = session(name, build), reference(name)
    answers: dict[tuple[str, int], tuple[int, ...]] = {}
    for prompt in PROMPTS:
        for number, picture in enumerate(pictures):
            found = vlm.generate(prompt, [picture], temperature=0.0, max_new_tokens=NEW)
            assert found.tokens == model.answer(prompt, picture), prompt
            answers[prompt, number] = tuple(found.tokens)
    assert len({answers[prompt, 0] for prompt in PROMPTS}) > 4  # what is read shows in what is said: the prompt …
    assert any(answers[prompt, 0] != answers[prompt, 1] for prompt in PROMPTS)  # … and the picture


@pytest.mark.parametrize("build", ["portable", "cpu-fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_unlike_rows(name: str, build: str, session: Any, reference: Any, pictures: list[Image.Image]) -> None:
    vlm, model = session(name, build), reference(name)
    prompts, images = ["a red circle left of", "", "is it red"], [pictures[0], pictures[1], pictures[1]]
    together = vlm.generate(prompts, [[image] for image in images], temperature=0.0, max_new_tokens=NEW)
    assert [one.tokens for one in together] == [model.answer(*row) for row in zip(prompts, images, strict=True)]


@pytest.mark.parametrize("build", ["portable", "cpu-fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_beams(name: str, build: str, session: Any, reference: Any, pictures: list[Image.Image]) -> None:
    vlm, model = session(name, build), reference(name)
    for prompt in PROMPTS[:4]:
        found = vlm.generate(prompt, [pictures[1]], temperature=0.0, num_beams=3, max_new_tokens=NEW)
        assert found.tokens == model.answer(prompt, pictures[1], num_beams=3), prompt


@pytest.mark.parametrize("name", NAMES)
def test_four_bit_build(name: str, session: Any, pictures: list[Image.Image]) -> None:
    vlm = session(name, "cpu-int4")
    found = vlm.generate("a photo of", [pictures[0]], temperature=0.0, max_new_tokens=NEW, ignore_eos=True)
    assert len(found.tokens) == NEW
    with pytest.raises(PromptError, match="at least 1 images"):
        vlm.generate("a photo of")


@torch.no_grad()
@pytest.mark.parametrize("build", ["portable", "cpu-fp32"])
def test_where_it_looked(build: str, session: Any, reference: Any, pictures: list[Image.Image]) -> None:
    """Show-Attend-Tell: the attention that each word was chosen with, as the model gives it for the text so far."""
    vlm, model = session("show_attend_tell", build), reference("show_attend_tell")
    for prompt in ("", "is it red"):
        found = vlm.generate(prompt, [pictures[0]], temperature=0.0, max_new_tokens=NEW, return_attention=True)
        before = model.ids(prompt)
        text = torch.cat([before, torch.tensor([found.tokens[:-1]], dtype=torch.long)], 1)
        expected = model.model(text, model.pixels(pictures[0])).attention[0, before.shape[1] - 1 :]
        assert found.attention.shape == (len(found.tokens), model.model.config.places)
        np.testing.assert_allclose(found.attention, expected.numpy(), rtol=0, atol=1e-5)
        assert np.abs(found.attention[0] - found.attention[-1]).max() > 1e-3


def test_the_state_is_kept_by_the_loop_in_c(session: Any) -> None:
    """A build of a decoder without a KV cache has nothing that grows; its loop over tokens survives quantised weights."""
    for build in ("cpu-fp32", "cpu-int4"):
        vlm = session("show_attend_tell", build)
        assert vlm.build.kv.shared_buffer and vlm.build.kv.layers == 0
        assert vlm.memory()["kv_capacity"] == 0
    kinds = [node.op_type for node in onnx.load(vlm.path / vlm.build.graphs["decoder"].model.file).graph.node]
    assert "Scan" in kinds and "MatMulNBits" in kinds


@torch.no_grad()
def test_a_long_text_and_a_stream(session: Any, reference: Any, pictures: list[Image.Image]) -> None:
    """A state is carried over many tokens; what was streamed is what is generated at once."""
    vlm, model = session("show_attend_tell"), reference("show_attend_tell")
    wanted = model.answer("a", pictures[0], max_new_tokens=60, eos_token_id=None)
    found = vlm.generate("a", [pictures[0]], temperature=0.0, max_new_tokens=60, ignore_eos=True)
    assert found.tokens == wanted
    pieces = list(vlm.stream("a", [pictures[0]], temperature=0.0, max_new_tokens=60, ignore_eos=True))
    assert "".join(pieces) == found.text


def test_attention_is_refused_where_there_is_none(session: Any, pictures: list[Image.Image]) -> None:
    with pytest.raises(CapabilityError):
        session("visual_gpt").generate("", [pictures[0]], return_attention=True)


# --- CoCa's other half ---


@torch.no_grad()
def _similarity(model: Reference, pictures: list[Image.Image], texts: list[str]) -> Any:
    """The model's own, on texts that end with [CLS] and are padded on the right."""
    end = model.model.config.decoder.cls_token_id
    rows = [[*model.tokenizer(text)["input_ids"], end] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [1] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return model.model.similarity(model.pixels(*pictures), ids, mask)


@pytest.mark.parametrize("build", ["portable", "cpu-fp32"])
def test_images_and_texts(build: str, session: Any, reference: Any, pictures: list[Image.Image]) -> None:
    vlm, expected = session("coca", build), _similarity(reference("coca"), pictures, TEXTS)
    assert isinstance(vlm, ContrastiveCaptioner)
    found = vlm.similarity(pictures, TEXTS)
    np.testing.assert_allclose(found.logits, expected.logits_per_image.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.probabilities, expected.logits_per_image.softmax(-1).numpy(), rtol=0, atol=1e-4)
    assert found.logits.std() > 0.1
    vectors = vlm.image_vectors(pictures, normalize=False)
    np.testing.assert_allclose(vectors, expected.image_embeds.numpy(), rtol=0, atol=1e-4 * np.abs(vectors).max())
    vectors = vlm.embed_text(TEXTS, normalize=False)
    np.testing.assert_allclose(vectors, expected.text_embeds.numpy(), rtol=0, atol=1e-4 * np.abs(vectors).max())
    np.testing.assert_allclose(np.linalg.norm(vlm.embed_text(TEXTS), axis=1), 1, atol=1e-6)


def test_labels(session: Any, reference: Any, pictures: list[Image.Image]) -> None:
    labels = ["cat", "dog", "sea"]
    expected = _similarity(reference("coca"), pictures[:1], [f"a photo of a {label}" for label in labels])
    ranked = session("coca").classify(pictures[0], labels)
    assert [one.label for one in ranked] == [labels[i] for i in expected.logits_per_image[0].argsort(descending=True)]
    assert sum(one.score for one in ranked) == pytest.approx(1, abs=1e-6)


def test_an_image_is_encoded_once_for_both(session: Any, pictures: list[Image.Image]) -> None:
    vlm = session("coca")
    vlm.generate("", [pictures[0]], temperature=0.0, max_new_tokens=2)
    calls = len(vlm.graph_times()["vision_encoder"])
    vlm.similarity(pictures[0], TEXTS)
    assert len(vlm.graph_times()["vision_encoder"]) == calls
    assert vlm.comparison_stats.image_cache_misses == 0
    vlm.image_vectors(pictures[1])
    assert vlm.comparison_stats.image_cache_misses == 1
    vlm.generate("", [pictures[1]], temperature=0.0, max_new_tokens=2)
    assert vlm.stats.image_cache_misses == 0
    assert vlm.embed_image(pictures[0]).shape == (5, 64)  # what the decoder reads is another thing
    assert vlm.memory()["text_cache"] > 0
    vlm.clear_caches()
    assert vlm.memory()["text_cache"] == vlm.memory()["image_cache"] == 0


def test_what_can_be_asked(session: Any, pictures: list[Image.Image]) -> None:
    with pytest.raises(ContextLengthError, match="reads 256"):
        session("coca").embed_text("a cat " * 300)
    with pytest.raises(CapabilityError, match=r"has no similarity\(\); it has: generate\(\)"):
        session("visual_gpt").similarity(pictures[0], TEXTS)
    assert not isinstance(session("visual_gpt"), ContrastiveCaptioner)
    assert isinstance(session("coca"), VisionLanguageModel)


def test_the_four_bit_build_compares(session: Any, pictures: list[Image.Image]) -> None:
    found = session("coca", "cpu-int4").similarity(pictures, TEXTS)
    assert found.logits.shape == (2, 3) and np.isfinite(found.logits).all()
    np.testing.assert_allclose(found.probabilities.sum(1), 1, atol=1e-6)
