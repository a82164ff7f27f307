"""Images that Janus writes: codes as transformers' own `generate` chooses them, pixels as it decodes them."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import JanusForConditionalGeneration, JanusProcessor

from vlm_edge_runtime import CapabilityError, ContextLengthError, GenerationCancelled, OptionError
from vlm_edge_runtime.sessions.image_tokens import guided, pixels_of
from vlm_edge_runtime.sessions.registry import methods

PROMPTS = ["a photo of a cat", "two green triangles on a sea", "USER: draw a red circle, please! ASSISTANT:"]
TOKENS = 16


class ImageReference:
    """A checkpoint of Janus in PyTorch with its processor."""

    def __init__(self, folder: Path) -> None:
        self.model = JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = JanusProcessor.from_pretrained(folder)

    @torch.inference_mode()
    def codes(self, text: str, scale: float | None = None) -> list[int]:
        inputs = self.processor(text=text, generation_mode="image", return_tensors="pt")
        given = {} if scale is None else {"guidance_scale": scale}
        return self.model.generate(**inputs, generation_mode="image", do_sample=False, use_cache=True, **given)[0].tolist()

    @torch.inference_mode()
    def pixels(self, codes: list[int]) -> torch.Tensor:
        """float32 [3, height, width]."""
        return self.model.decode_image_tokens(torch.tensor([codes]))[0].permute(2, 0, 1)

    def picture(self, codes: list[int]) -> np.ndarray:
        found = self.processor.postprocess([self.pixels(codes)], return_tensors="PIL.Image.Image")["pixel_values"][0]
        return np.asarray(found).astype(int)


@pytest.fixture(scope="module")
def janus(tiny_checkpoint) -> ImageReference:
    return ImageReference(tiny_checkpoint("janus"))


@pytest.mark.parametrize("build", ["portable", "cpu-fp32"])
def test_codes_and_pixels(build, session, janus) -> None:
    vlm = session("janus", build)
    seen = set()
    for text in PROMPTS:
        for scale in (None, 2.0, 7.5):
            expected = janus.codes(text, scale)
            got = vlm.generate_image(text, raw=True, temperature=0, guidance_scale=scale)
            assert got.codes == expected, (text, scale)
            pixels = janus.pixels(expected).numpy()
            difference = np.abs(pixels_of(vlm._engine, expected) - pixels).max() / max(1.0, np.abs(pixels).max())
            assert difference < 1e-4
            assert np.abs(np.asarray(got.image).astype(int) - janus.picture(expected)).max() <= 1
            seen.add(tuple(expected))
    assert len(seen) > len(PROMPTS)  # prompts and guidance matter


def test_guidance_of_one_is_none(session, janus) -> None:
    """transformers refuses it; here the prompt's own logits decide, which the model's first step shows."""
    got = session("janus").generate_image(PROMPTS[0], raw=True, temperature=0, guidance_scale=1)
    inputs = janus.processor(text=PROMPTS[0], generation_mode="image", return_tensors="pt")
    with torch.inference_mode():
        codes: list[int] = []
        embeds = janus.model.get_input_embeddings()(inputs["input_ids"])
        for _ in range(TOKENS):
            hidden = janus.model.model.language_model(inputs_embeds=embeds).last_hidden_state[:, -1]
            codes.append(int(janus.model.model.generation_head(hidden).argmax()))
            following = janus.model.prepare_embeddings_for_image_generation(torch.tensor([[codes[-1]]]))
            embeds = torch.cat([embeds, following], 1)
    assert got.codes == codes


def test_the_formula() -> None:
    conditional, unconditional = np.array([1.0, 2.0], np.float32), np.array([3.0, 0.5], np.float32)
    np.testing.assert_allclose(guided(conditional, unconditional, 3.0), [-3.0, 5.0])


def test_messages_are_rendered(session, janus, tiny_checkpoint) -> None:
    vlm = session("janus")
    text = "USER: a house of trees\nASSISTANT:"
    got = vlm.generate_image([{"role": "user", "content": "a house of trees"}], temperature=0)
    assert got.codes == janus.codes(text)
    assert vlm.generate_image("a house of trees", temperature=0).codes == got.codes


def test_a_seed_reproduces_an_image(session) -> None:
    vlm = session("janus")
    first, again, other = (vlm.generate_image(PROMPTS[0], seed=seed, top_k=20, top_p=0.95) for seed in (3, 3, 4))
    assert first.codes == again.codes and first.codes != other.codes
    assert vlm.generate_image(PROMPTS[0], seed=None).seed >= 0
    assert len(first.codes) == TOKENS and first.image.size == (32, 32)


def test_four_bits(session) -> None:
    got = session("janus", "cpu-int4").generate_image(PROMPTS[1], temperature=0)
    assert len(got.codes) == TOKENS and len(set(got.codes)) > 1


def test_what_is_refused(session, tmp_path) -> None:
    vlm = session("janus")
    with pytest.raises(OptionError, match="guidance_scale"):
        vlm.generate_image(PROMPTS[0], guidance_scale=-1.0)
    with pytest.raises(OptionError, match="unknown image option 'size'"):
        vlm.generate_image(PROMPTS[0], size=3)
    with pytest.raises(ContextLengthError, match="an image 16"):
        vlm.generate_image("the sea " * 200)
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(GenerationCancelled, match="after 0 codes"):
        vlm.generate_image(PROMPTS[0], cancel=cancelled)


def test_a_model_of_text_says_so(session) -> None:
    vlm = session("llava-llama", "portable")
    assert "generate_image" not in methods(vlm.manifest)
    assert "generate_image" in methods(session("janus").manifest)
    with pytest.raises(CapabilityError, match="writes text only"):
        vlm.generate_image("a cat")
