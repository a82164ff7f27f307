"""A bundle as a side of the comparison: our preprocessing, our tokens, our engines, without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_edge_runtime import DualEncoder, VisionLanguageModel, load
from vlm_edge_runtime.engines.base import SamplingParams
from vlm_edge_runtime.errors import ParityError

from .examples import Example
from .subject import Answer, Array, Floats, Prepared


class BundleGenerator:
    """One build of a bundle that answers in words. Nothing is cached between calls: each does all its work."""

    def __init__(self, path: str | Path, build: str) -> None:
        self.name = build
        session = load(path, device="cpu", build=build, image_cache_bytes=0, prefix_cache=False, verify=False)
        if not isinstance(session, VisionLanguageModel):
            session.close()
            raise ParityError(f"{path} does not generate text.")
        self._session = session

    def close(self) -> None:
        self._session.close()

    # The session's parts are used directly below: its public methods return text, parity needs what is underneath.

    def prepare(self, example: Example) -> Prepared:
        row = self._row(example)
        pixels = [self._session._images.processor(image).arrays["pixel_values"] for image in example.images]
        return Prepared([int(token) for token in row.input_ids], list(pixels))

    def forced(self, example: Example, answer: Sequence[int]) -> Floats:
        session, row = self._session, self._row(example)
        decoder = session._decoder()
        features = session._images.features(row.pictures).features
        state = decoder.allocate(1, len(row) + len(answer))
        try:
            state.prefill(0, session._prompts.embed(decoder, row, 0, len(row), features), row.positions)
            logits = [state.logits(0)]
            if len(answer) > 1:
                state.start(0, SamplingParams(), row.input_ids, row.next_position)
            for token in answer[:-1]:  # one decode step each, as in generation
                state.push(0, int(token))
                logits.append(state.logits(0))
        finally:
            state.close()
        return np.stack(logits)

    def greedy(self, example: Example, max_new_tokens: int) -> Answer:
        found = self._session.generate(
            example.prompt, list(example.images), temperature=0.0, repetition_penalty=1.0, max_new_tokens=max_new_tokens
        )
        return Answer(list(found.tokens), found.text)

    def words(self, tokens: Sequence[int]) -> list[str]:
        return [self._session._prompts.tokenizer.decode([int(token)]) for token in tokens]

    def _row(self, example: Example) -> Any:
        return self._session._prompts.row(example.prompt, list(example.images), raw=False)


class BundleEncoder:
    """One build of a bundle that embeds pictures and texts."""

    def __init__(self, path: str | Path, build: str) -> None:
        self.name = build
        session = load(path, device="cpu", build=build, image_cache_bytes=0, verify=False)
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
