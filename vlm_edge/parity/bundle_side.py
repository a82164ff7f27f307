"""A bundle as a side of the comparison: our preprocessing, our tokens, our engines, without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_edge_runtime import ContrastiveCaptioner, DualEncoder, VisionLanguageModel, load
from vlm_edge_runtime.bundle.manifest import GenerativeContract
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.errors import ParityError

from .examples import Example
from .subject import Answer, Array, Floats, Prepared

_SPECIAL_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"}
"""What of generation_config.json counts in a comparison; both sides leave penalties, beams and forced tokens out."""


class BundleGenerator:
    """One build of a bundle that answers in words. Nothing is cached between calls: each does all its work."""

    def __init__(self, path: str | Path, build: str) -> None:
        self.name = build
        session = load(path, device="auto", build=build, image_cache_bytes=0, prefix_cache=False, verify=False)
        if not isinstance(session, VisionLanguageModel):
            session.close()
            raise ParityError(f"{path} does not generate text.")
        self._session = session
        bundle = open_bundle(path, verify=False)
        known = bundle.read_json("generation_config.json") if bundle.has_file("generation_config.json") else {}
        memory = getattr(bundle.manifest.contract, "memory", None)
        self._decoder_reads = memory is None or memory.source != "encoder"
        self._controls = sorted(known.keys() - _SPECIAL_TOKENS)
        contract = bundle.manifest.contract
        # A model of videos alone sees a picture as a video that stands still.
        self._videos = isinstance(contract, GenerativeContract) and contract.modality("image") is None

    def _seen(self, example: Example) -> dict[str, Any]:
        if self._videos:
            return {"images": None, "videos": [[image] for image in example.images]}
        return {"images": list(example.images)}

    def close(self) -> None:
        self._session.close()

    def prepare(self, example: Example) -> Prepared:
        found = self._session.prepare(example.prompt, **self._seen(example))
        pixels = [_pixels(one.arrays) for one in found.inputs]
        return Prepared(found.token_ids, pixels, found.decoder_ids if self._decoder_reads else [])

    def forced(self, example: Example, answer: Sequence[int]) -> Floats:
        return self._session.logits_along(example.prompt, answer_tokens=answer, **self._seen(example))

    def greedy(self, example: Example, max_new_tokens: int) -> Answer:
        found = self._session.generate(
            example.prompt, temperature=0.0, max_new_tokens=max_new_tokens, ignore_config=self._controls, **self._seen(example)
        )
        return Answer(list(found.tokens), found.text)

    def words(self, tokens: Sequence[int]) -> list[str]:
        return [self._session.decode_tokens([token]) for token in tokens]

    # -- a captioner that also compares pictures with texts

    def pixels(self, image: Image.Image) -> Array:
        return self.prepare(Example((image,), "")).pixels[0]

    def embed_images(self, images: Sequence[Image.Image]) -> Floats:
        session = self._captioner()
        return np.concatenate([session.image_vectors(image) for image in images])

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        session = self._captioner()
        return np.concatenate([session.embed_text(text) for text in texts])

    def _captioner(self) -> ContrastiveCaptioner:
        if not isinstance(self._session, ContrastiveCaptioner):
            raise ParityError(f"{self.name} does not compare pictures with texts.")
        return self._session


def _pixels(arrays: Mapping[str, Array]) -> Array:
    """The largest array of numbers that are no integers: the picture."""
    found = [array for array in arrays.values() if np.issubdtype(array.dtype, np.floating)]
    return max(found, key=lambda array: array.size) if found else np.zeros(0, np.float32)


class BundleEncoder:
    """One build of a bundle that embeds pictures and texts."""

    def __init__(self, path: str | Path, build: str) -> None:
        self.name = build
        session = load(path, device="auto", build=build, image_cache_bytes=0, verify=False)
        if not isinstance(session, DualEncoder):
            session.close()
            raise ParityError(f"{path} is not a dual encoder.")
        self._session = session

    def close(self) -> None:
        self._session.close()

    def pixels(self, image: Image.Image) -> Array:
        found: Array = self._session._images.processor(image).arrays["pixel_values"]
        return found

    def embed_images(self, images: Sequence[Image.Image]) -> Floats:
        # One at a time: int8 ranges are taken over a batch, and the reference embeds one at a time too.
        return np.concatenate([self._session.embed_image(image) for image in images])

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        return np.concatenate([self._session.embed_text(text) for text in texts])
