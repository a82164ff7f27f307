"""What every session that compares images with texts can be asked, whatever else it does."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_edge_runtime.preprocess import ImageLike

from .base import Session
from .common_space import CommonSpace, LabelScore, Similarity
from .media import Floats


class Compares(Session):
    """A session with a space that images and texts have in common."""

    _space: CommonSpace

    def embed_text(self, texts: str | Sequence[str], *, normalize: bool = True) -> Floats:
        """Vectors float32 `[texts, dim]` of one text or several, of unit length unless `normalize` is off.

        Raises ContextLengthError for a text longer than the text encoder reads, PromptError for what is no text.
        """
        self._check_open()
        return self._space.embed_text(texts, normalize=normalize)

    def similarity(self, images: ImageLike | Sequence[ImageLike], texts: str | Sequence[str]) -> Similarity:
        """Logits and probabilities of every image with every text. Raises ImageError, and the errors of `embed_text`."""
        self._check_open()
        return self._space.similarity(images, texts)

    def classify(
        self, image: ImageLike, labels: Sequence[str], template: str | Sequence[str] = "a photo of a {}"
    ) -> list[LabelScore]:
        """The labels, the likeliest first.

        `template` makes a sentence of each label; several are averaged (prompt ensembling, arXiv 2103.00020, section 3.1.4).
        Raises PromptError for no labels, a template without `{}`; and the errors of `similarity`.
        """
        self._check_open()
        return self._space.classify(image, labels, template)
