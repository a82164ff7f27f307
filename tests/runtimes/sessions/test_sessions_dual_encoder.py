"""Embeddings, similarity and classification, compared with transformers."""

from __future__ import annotations

import numpy as np
import pytest
from session_pictures import noise

from vlm_edge_runtime import ContextLengthError, ImageError, PromptError
from vlm_edge_runtime.sessions.dual_encoder import sigmoid, softmax, unit_length

TEXTS = ["a photo of a cat", "a dog", "two photos of the sea"]


@pytest.fixture(scope="module")
def torch_similarity(tiny_checkpoint):
    import torch
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    @torch.inference_mode()
    def run(name: str, images, texts):
        folder = tiny_checkpoint(name)
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        pixels = AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")
        padding = {"padding": True} if name == "clip" else {"padding": "max_length", "max_length": 16}
        words = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", **padding)
        words.pop("token_type_ids", None)
        if name == "siglip":
            words.pop("attention_mask")
        out = model(**pixels, **words)
        return out.logits_per_image.numpy(), out.image_embeds.numpy(), out.text_embeds.numpy()

    return run


@pytest.mark.parametrize("build", ["portable", "cpu-fp32"])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_as_transformers(name, build, session, torch_similarity) -> None:
    encoder = session(name, build)
    images = [noise(1), noise(2, 50, 70), noise(3, 200, 33)]
    logits, image_embeds, text_embeds = torch_similarity(name, images, TEXTS)
    found = encoder.similarity(images, TEXTS)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(encoder.embed_image(images), unit_length(image_embeds), rtol=0, atol=1e-4)
    np.testing.assert_allclose(encoder.embed_text(TEXTS), unit_length(text_embeds), rtol=0, atol=1e-4)
    if name == "clip":
        np.testing.assert_allclose(found.probabilities.sum(1), 1, atol=1e-6)
    else:
        np.testing.assert_allclose(found.probabilities, 1 / (1 + np.exp(-found.logits.astype(np.float64))), atol=1e-6)


@pytest.mark.parametrize("build", ["cpu-fp32", "cpu-int8"])
def test_neighbours_and_caches_do_not_matter(build, session) -> None:
    encoder = session("clip", build)
    images = [noise(seed, 40 + seed, 60) for seed in range(20)]
    together = encoder.embed_image(images)
    assert together.shape == (20, 32)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    texts = encoder.embed_text(TEXTS)
    encoder.clear_caches()
    np.testing.assert_allclose(encoder.embed_image(images[7])[0], together[7], rtol=0, atol=1e-5)
    np.testing.assert_allclose(encoder.embed_text(TEXTS[1])[0], texts[1], rtol=0, atol=1e-5)
    encoder.embed_image([images[7], images[7], images[8]])
    assert (encoder.stats.image_cache_hits, encoder.stats.image_cache_misses) == (2, 1)
    encoder.embed_text([TEXTS[1], TEXTS[2]])
    assert (encoder.stats.text_cache_hits, encoder.stats.text_cache_misses) == (1, 1)
    raw = encoder.embed_image(images[7], normalize=False)
    np.testing.assert_allclose(unit_length(raw), together[7:8], rtol=0, atol=1e-5)
    assert encoder.memory()["image_cache"] > 0


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_classify(name, session) -> None:
    encoder = session(name)
    labels = ["cat", "dog", "sea"]
    ranked = encoder.classify(noise(1), labels)
    assert sorted(result.label for result in ranked) == sorted(labels)
    assert [result.logit for result in ranked] == sorted((result.logit for result in ranked), reverse=True)
    direct = encoder.similarity(noise(1), [f"a photo of a {label}" for label in labels])
    for result in ranked:
        assert result.score == pytest.approx(direct.probabilities[0, labels.index(result.label)], abs=1e-6)
    several = encoder.classify(noise(1), labels, template=["a photo of a {}", "the {}"])
    assert {result.label for result in several} == set(labels)


def test_errors(session) -> None:
    encoder = session("clip")
    with pytest.raises(ContextLengthError, match="reads 16"):
        encoder.embed_text("a photo of a cat " * 10)
    with pytest.raises(PromptError, match="at least one text"):
        encoder.embed_text([])
    with pytest.raises(PromptError, match="at least one text"):
        encoder.classify(noise(1), [1, 2])
    with pytest.raises(PromptError, match=r"\{\}"):
        encoder.classify(noise(1), ["cat"], template="a photo")
    with pytest.raises(ImageError, match="no image"):
        encoder.embed_image([])
    with pytest.raises(ImageError):
        encoder.embed_image("no-such-file.png")


def test_numbers_of_any_size() -> None:
    huge = np.asarray([[1000.0, -1000.0, 999.0]], dtype=np.float32)
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_allclose(softmax(huge), [[1 / (1 + np.exp(-1)), 0, np.exp(-1) / (1 + np.exp(-1))]], atol=1e-6)
        np.testing.assert_allclose(sigmoid(huge), [[1, 0, 1]], atol=1e-7)
    np.testing.assert_array_equal(unit_length(np.zeros((1, 3), np.float32)), np.zeros((1, 3)))
