"""The session of captioners that also compare images with texts (CoCa, arXiv 2205.01917)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_edge_runtime.bundle.manifest import DualEncoderContract, GenerativeContract
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.engines.base import Engine
from vlm_edge_runtime.errors import BundleError
from vlm_edge_runtime.preprocess import ImageLike

from .common_space import CommonSpace, EmbeddingStats
from .compares import Compares
from .media import Array, Encoded, Features, Floats, Medium
from .modalities import Modalities
from .modality_graphs import wanted
from .vision_language_model import VisionLanguageModel


class ContrastiveCaptioner(Compares, VisionLanguageModel):
    """A vision-language model whose bundle also has vectors of images and texts in one space. Made by `load()`.

    An image is encoded once for both: what its caption was written from is what its vector is made of. Vectors of images share
    the budget of encoded images, those of texts are cached by text.
    """

    def __init__(self, bundle: Bundle, engine: Engine, **options: Any) -> None:
        super().__init__(bundle, engine, **options)
        contract = bundle.manifest.contract
        contrast = contract.contrast if isinstance(contract, GenerativeContract) else None
        if contrast is None:
            raise BundleError(f"{bundle.path} does not say how it compares images with texts: export it again.")
        vectors = _Vectors(bundle, engine, contrast, self._parts.modalities)
        self._space = CommonSpace(bundle, engine, contrast, vectors, self._parts.prompts.tokenizer)

    @property
    def comparison_stats(self) -> EmbeddingStats:
        """Figures of the last call of one of the methods below."""
        return self._space.stats

    def image_vectors(self, images: ImageLike | Sequence[ImageLike], *, normalize: bool = True) -> Floats:
        """Vectors float32 `[images, dim]` that go with those of `embed_text`, of unit length unless `normalize` is off.

        `embed_image` gives what the decoder reads instead. Raises ImageError, DeviceError.
        """
        self._check_open()
        return self._space.embed_image(images, normalize=normalize)

    def memory(self) -> dict[str, int]:
        """Bytes: as `VisionLanguageModel.memory`, and `text_cache` (the kept vectors of texts)."""
        return {**super().memory(), "text_cache": self._space.text_bytes}

    def clear_caches(self) -> None:
        """Forgets encoded images, kept prefixes, and the vectors of images and texts."""
        super().clear_caches()
        self._space.clear_texts()


class _Vectors:
    """Images' vectors, which the contrast's graphs make of the features that the decoder reads."""

    def __init__(self, bundle: Bundle, engine: Engine, contrast: DualEncoderContract, modalities: Modalities) -> None:
        missing = [role for role in (*contrast.image_graphs, "text_encoder") if role not in bundle.graphs]
        if missing or not contrast.image_graphs:
            raise BundleError(f"{bundle.path} has no graph {', '.join(missing) or 'for the vectors of images'}: export it again.")
        self._engine = engine
        self._roles = list(contrast.image_graphs)
        self._modalities = modalities
        self._given = bundle.graphs[modalities.modality("image").graphs[-1]].outputs[0].name

    def open(self, source: Any) -> Medium:
        """Opens one image. Raises ImageError."""
        return self._modalities.open("image", source)

    def features(self, media: Sequence[Medium]) -> Encoded:
        """Vectors float32 `[1, dim]` by medium key, and how many images were encoded for them."""
        kept = self._modalities.kept
        found = {medium.key: vector for medium in media if (vector := kept.get(_key(medium))) is not None}
        missing = {medium.key: medium for medium in media if medium.key not in found}
        encoded = self._modalities.features(list(missing.values()))
        for key, medium in missing.items():
            found[key] = vector = Features(self._run(encoded.features[key].values))
            kept.put(_key(medium), vector, vector.bytes)
        return Encoded(found, encoded.encoded)

    def _run(self, features: Array) -> Floats:
        arrays: dict[str, Array] = {self._given: features[None]}
        outputs: dict[str, Array] = {}
        for role in self._roles:
            graph = self._engine.graph(role)
            outputs = graph.run(wanted(role, graph.inputs, arrays))
            arrays |= outputs
        return np.array(next(iter(outputs.values())), dtype=np.float32)


def _key(medium: Medium) -> str:
    return f"{medium.key}/vector"
