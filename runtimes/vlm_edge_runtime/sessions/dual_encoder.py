"""The session of dual encoders: images and texts as vectors of one space (CLIP, arXiv 2103.00020; SigLIP, 2303.15343)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm_edge_runtime.bundle.manifest import DualEncoderContract
from vlm_edge_runtime.bundle.reader import Bundle
from vlm_edge_runtime.engines.base import Engine
from vlm_edge_runtime.errors import BundleError
from vlm_edge_runtime.preprocess import ImageLike
from vlm_edge_runtime.text import Tokenizer

from .base import missing_method
from .common_space import CommonSpace, EmbeddingStats, LabelScore, Similarity, sigmoid, softmax, unit_length
from .compares import Compares
from .lru import ByteLRU
from .media import Floats, MediaStore
from .modality_graphs import ModalityGraphs
from .readers import ImageReader

__all__ = ["DualEncoder", "EmbeddingStats", "LabelScore", "Similarity", "sigmoid", "softmax", "unit_length"]


class DualEncoder(Compares):
    """Embeds images and texts, and compares them. Made by `load()`. Safe to use from several threads.

    Vectors of images are cached by content, those of texts by text.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        *,
        image_cache_bytes: int = 256 << 20,
        image_options: Mapping[str, Any] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(bundle, engine)
        contract = bundle.manifest.contract
        if not isinstance(contract, DualEncoderContract):
            raise BundleError(f"{bundle.path} is of family {bundle.manifest.family}: it is not a dual encoder.")
        self._images = MediaStore(
            ImageReader(self._image_processor(image_options)),
            ModalityGraphs(engine, bundle.graphs, contract.image_graphs).per_image,
            variant=bundle.build_name,
            kept=ByteLRU(image_cache_bytes),
        )
        self._space = CommonSpace(bundle, engine, contract, self._images, tokenizer)

    def __getattr__(self, name: str) -> Any:
        raise missing_method(self, name)

    @property
    def stats(self) -> EmbeddingStats:
        """Figures of the last call."""
        return self._space.stats

    def embed_image(self, images: ImageLike | Sequence[ImageLike], *, normalize: bool = True) -> Floats:
        """Vectors float32 `[images, dim]` of one image or several, of unit length unless `normalize` is off.

        Raises ImageError, DeviceError.
        """
        self._check_open()
        return self._space.embed_image(images, normalize=normalize)

    def memory(self) -> dict[str, int]:
        """Bytes: `weights` (the build's graph files), `image_cache` and `text_cache` (what is kept now)."""
        return {**super().memory(), "image_cache": self._images.bytes, "text_cache": self._space.text_bytes}

    def clear_caches(self) -> None:
        """Forgets the vectors of images and texts."""
        self._images.clear()
        self._space.clear_texts()
