"""Images and texts as vectors of one space, and what follows from them; a part of every session that compares them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.bundle.manifest import DualEncoderContract, SigmoidSimilarity
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.engines.base import Engine
from vlm_edge_runtime.errors import ContextLengthError, ImageError, PromptError
from vlm_edge_runtime.preprocess import ImageLike
from vlm_edge_runtime.text import Tokenizer, load_tokenizer

from .inputs import as_images
from .lru import ByteLRU
from .media import Encoded, Floats, Medium

TEXTS_PER_CALL = 64
TEXT_CACHE_BYTES = 16 << 20


@dataclass(slots=True, frozen=True)
class Similarity:
    """How alike images and texts are, both float32 `[images, texts]`.

    `logits`: the scaled (and, for SigLIP, shifted) cosine. `probabilities`: by softmax over the texts (CLIP), where a row adds up
    to 1; or by a sigmoid of each pair on its own (SigLIP), where it need not.
    """

    logits: Floats
    probabilities: Floats


@dataclass(slots=True, frozen=True)
class LabelScore:
    """One label of a classification. `score` is its probability, `logit` what that was made from."""

    label: str
    score: float
    logit: float


@dataclass(slots=True)
class EmbeddingStats:
    """Figures of the last call. Times in seconds; `image_s` includes preprocessing."""

    images: int = 0
    texts: int = 0
    image_s: float = 0.0
    text_s: float = 0.0
    image_cache_hits: int = 0
    image_cache_misses: int = 0
    text_cache_hits: int = 0
    text_cache_misses: int = 0

    def to_dict(self) -> dict[str, int | float]:
        """Every number."""
        return asdict(self)


class ImageVectors(Protocol):
    """Where the vectors of images come from, each `[1, dim]`."""

    def open(self, source: Any) -> Medium:
        """Opens one image. Raises ImageError."""

    def features(self, media: Sequence[Medium]) -> Encoded:
        """The vectors by medium key."""


class CommonSpace:
    """Embeds images and texts, and compares them, by a DualEncoderContract: a bundle's whole contract, or a part of it.

    Vectors of texts are cached by text, those of images where `images` does so. Safe to use from several threads.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        contract: DualEncoderContract,
        images: ImageVectors,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """`tokenizer`: the bundle's, where it has been read already."""
        self._contract = contract
        self._engine = engine
        self._images = images
        self._tokenizer = load_tokenizer(bundle) if tokenizer is None else tokenizer
        self._texts: ByteLRU[str, Floats] = ByteLRU(TEXT_CACHE_BYTES)
        # In ONNX graphs one scale is for all activations of a call, so a text's vector would depend on its neighbours;
        # in plans each row has its own.
        self._texts_per_call = 1 if bundle.graphs["text_encoder"].precision == "int8" else TEXTS_PER_CALL
        self.stats = EmbeddingStats()
        """Figures of the last call."""

    def embed_image(self, images: ImageLike | Sequence[ImageLike], *, normalize: bool = True) -> Floats:
        """Vectors float32 `[images, dim]`. Raises ImageError, DeviceError."""
        self.stats = stats = EmbeddingStats()
        return self._embed_images(as_images(images), stats, normalize)

    def embed_text(self, texts: str | Sequence[str], *, normalize: bool = True) -> Floats:
        """Vectors float32 `[texts, dim]`. Raises ContextLengthError, PromptError."""
        self.stats = stats = EmbeddingStats()
        return self._embed_texts(_as_texts(texts), stats, normalize)

    def similarity(self, images: ImageLike | Sequence[ImageLike], texts: str | Sequence[str]) -> Similarity:
        """Every image with every text. Errors as `embed_image` and `embed_text`."""
        self.stats = stats = EmbeddingStats()
        return self._compare(self._embed_images(as_images(images), stats, True), self._embed_texts(_as_texts(texts), stats, True))

    def classify(
        self, image: ImageLike, labels: Sequence[str], template: str | Sequence[str] = "a photo of a {}"
    ) -> list[LabelScore]:
        """The labels, the likeliest first. Raises PromptError for no labels or a template without `{}`, else as `similarity`."""
        names = _as_texts(labels)
        templates = _as_texts(template)
        for each in templates:
            if "{}" not in each:
                raise PromptError(f"the template {each!r} has no '{{}}' for the label to stand in.")
        self.stats = stats = EmbeddingStats()
        vectors = self._embed_images([image], stats, True)
        sentences = [each.replace("{}", name) for name in names for each in templates]
        texts = self._embed_texts(sentences, stats, True).reshape(len(names), len(templates), -1)
        result = self._compare(vectors, unit_length(texts.mean(1)) if len(templates) > 1 else texts[:, 0])
        scores = [
            LabelScore(name, float(score), float(logit))
            for name, score, logit in zip(names, result.probabilities[0], result.logits[0], strict=True)
        ]
        return sorted(scores, key=lambda score: -score.logit)

    @property
    def text_bytes(self) -> int:
        """Memory of the kept vectors of texts."""
        return self._texts.bytes

    def clear_texts(self) -> None:
        """Forgets the vectors of texts."""
        self._texts.clear()

    def _embed_images(self, images: Sequence[ImageLike | Medium], stats: EmbeddingStats, normalize: bool) -> Floats:
        began = time.perf_counter()
        if not images:
            raise ImageError("no image was given: pass one image, or a list of at least one.")
        pictures = [self._images.open(image) for image in images]
        encoded = self._images.features(pictures)
        vectors = np.concatenate([encoded.features[picture.key].values for picture in pictures]).astype(np.float32, copy=False)
        stats.images, stats.image_s = len(pictures), time.perf_counter() - began
        stats.image_cache_misses, stats.image_cache_hits = encoded.encoded, len(pictures) - encoded.encoded
        return unit_length(vectors) if normalize else vectors

    def _embed_texts(self, texts: Sequence[str], stats: EmbeddingStats, normalize: bool) -> Floats:
        began = time.perf_counter()
        found = {text: vector for text in texts if (vector := self._texts.get(text)) is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        rows = [self._tokenized(text) for text in missing]
        for start in range(0, len(missing), self._texts_per_call):
            chunk = slice(start, start + self._texts_per_call)
            vectors = self._encode(rows[chunk])
            for text, vector in zip(missing[chunk], vectors, strict=True):
                found[text] = np.array(vector)
                self._texts.put(text, found[text], vector.nbytes)
        stats.texts, stats.text_s = len(texts), time.perf_counter() - began
        stats.text_cache_misses, stats.text_cache_hits = len(missing), len(texts) - len(missing)
        vectors = np.stack([found[text] for text in texts])
        return unit_length(vectors) if normalize else vectors

    def _tokenized(self, text: str) -> list[int]:
        end = self._contract.end_token_id
        ids = [*self._tokenizer.encode(text), *([] if end is None else [end])]
        if len(ids) > self._contract.text_length:
            shown = text if len(text) <= 40 else text[:40] + "…"
            raise ContextLengthError(
                f"the text {shown!r} has {len(ids)} tokens, the text encoder reads {self._contract.text_length}: shorten it."
            )
        return ids

    def _encode(self, rows: Sequence[list[int]]) -> Floats:
        contract = self._contract
        width = contract.text_length if contract.text_padding == "max_length" else max(map(len, rows))
        ids = np.full((len(rows), width), contract.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        graph = self._engine.graph("text_encoder")
        feeds: dict[str, npt.NDArray[np.generic]] = {"input_ids": ids, "attention_mask": mask}
        (output,) = graph.run({spec.name: feeds[spec.name] for spec in graph.inputs}).values()
        return np.asarray(output, dtype=np.float32)

    def _compare(self, images: Floats, texts: Floats) -> Similarity:
        kind = self._contract.similarity
        logits = np.float32(kind.logit_scale) * (images @ texts.T)
        if isinstance(kind, SigmoidSimilarity):
            logits = logits + np.float32(kind.logit_bias)
            return Similarity(logits, sigmoid(logits))
        return Similarity(logits, softmax(logits))


def unit_length(vectors: Floats) -> Floats:
    """Each row of float32 `[n, dim]` divided by its length; a row of zeros stays one."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.finfo(np.float32).tiny), dtype=np.float32)


def softmax(logits: Floats) -> Floats:
    """Over the last axis, without overflow for logits of any size."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True), dtype=np.float32)


def sigmoid(logits: Floats) -> Floats:
    """1 / (1 + e⁻ˣ) as (1 + tanh(x/2)) / 2, which neither overflows nor warns."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * logits)), dtype=np.float32)


def _as_texts(texts: str | Sequence[str]) -> list[str]:
    found = [texts] if isinstance(texts, str) else list(texts)
    if not found or not all(isinstance(text, str) for text in found):
        raise PromptError(f"expected a text or a list of at least one text, found {texts!r:.80}.")
    return found
