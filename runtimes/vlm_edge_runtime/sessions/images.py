"""From what a caller calls an image to what the graphs make of it, encoded once per content."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlm_edge_runtime.preprocess import EncodedImage, ImageLike, ImageProcessor, content_hash, load_image

from .lru import ByteLRU

Floats = npt.NDArray[np.float32]

# Layouts (tile counts, grids) are a few bytes each; keeping many saves preprocessing where only they are needed.
_KEPT_LAYOUTS = 4096


@dataclass(slots=True, eq=False)
class Picture:
    """One image of a request: decoded, hashed, and measured for its place in the prompt.

    `layout` is the processor's result without its arrays; `arrays` are the vision encoder's inputs, made when needed.
    """

    key: str
    image: Image.Image
    layout: EncodedImage
    arrays: dict[str, npt.NDArray[np.generic]] | None = None

    @property
    def content_id(self) -> int:
        """A negative 63-bit number that stands for this content in the KV cache (token ids are never negative)."""
        return -1 - (int.from_bytes(hashlib.blake2b(self.key.encode(), digest_size=8).digest(), "big") >> 1)


Encode = Callable[[list[Picture], Callable[[], None]], list[Floats]]
"""Runs the vision graphs on pictures with arrays; calls its second argument between runs, which may raise to stop."""


@dataclass(slots=True, frozen=True)
class Encoded:
    """Features by picture key, and how many pictures were encoded for them."""

    features: dict[str, Floats]
    encoded: int


class ImageStore:
    """Decodes, preprocesses and encodes images, and remembers the features of those seen before.

    `variant` tells apart features that differ for the same pixels (the build). Features are kept within `budget` bytes,
    the least recently used ones go first. Safe to use from several threads; one of them encodes at a time.
    """

    def __init__(self, processor: ImageProcessor, encode: Encode, *, variant: str, budget: int) -> None:
        self.processor = processor
        self._encode = encode
        self._prefix = f"{processor.fingerprint}/{variant}/"
        self._features: ByteLRU[str, Floats] = ByteLRU(budget)
        self._layouts: ByteLRU[str, EncodedImage] = ByteLRU(_KEPT_LAYOUTS)
        self._encoding = threading.Lock()

    def picture(self, source: ImageLike | Picture) -> Picture:
        """Opens and measures one image. Raises ImageError when it is none."""
        if isinstance(source, Picture):
            return source
        image = load_image(source)
        key = self._prefix + content_hash(image)
        layout = self._layouts.get(key)
        if layout is not None:
            return Picture(key, image, layout)
        processed = self.processor(image)
        layout = replace(processed, arrays={})
        self._layouts.put(key, layout, 1)
        return Picture(key, image, layout, None if key in self._features else processed.arrays)

    def features(self, pictures: Sequence[Picture], between: Callable[[], None] = lambda: None) -> Encoded:
        """Features of every picture, each content encoded at most once. `between` is called between graph runs."""
        with self._encoding:
            return self._look_up_or_encode(pictures, between)

    @property
    def bytes(self) -> int:
        """Memory of the kept features."""
        return self._features.bytes

    def clear(self) -> None:
        """Forgets all features and layouts."""
        self._features.clear()
        self._layouts.clear()

    def _look_up_or_encode(self, pictures: Sequence[Picture], between: Callable[[], None]) -> Encoded:
        found: dict[str, Floats] = {}
        missing: dict[str, Picture] = {}
        for picture in pictures:
            if picture.key in found or picture.key in missing:
                continue
            cached = self._features.get(picture.key)
            if cached is not None:
                found[picture.key] = cached
            else:
                missing[picture.key] = picture
        for picture in missing.values():
            if picture.arrays is None:
                picture.arrays = self.processor(picture.image).arrays
        for picture, features in zip(missing.values(), self._encode(list(missing.values()), between), strict=True):
            found[picture.key] = features
            self._features.put(picture.key, features, features.nbytes)
        for picture in pictures:
            picture.arrays = None
        return Encoded(found, len(missing))
