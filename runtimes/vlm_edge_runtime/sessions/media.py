"""From what a caller passes in to what the graphs make of it, each content encoded once."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vlm_edge_runtime.errors import PromptError
from vlm_edge_runtime.preprocess import EncodedImage

from .lru import ByteLRU

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]

# Layouts (tile counts, grids) are a few bytes each; keeping many saves preprocessing where only they are needed.
_KEPT_LAYOUTS = 4096


@dataclass(slots=True, eq=False)
class Medium:
    """One image, video, audio input or state of a request: decoded, hashed, and measured for its place in the prompt.

    `layout` is the processor's result without its arrays; `arrays` are the first graph's inputs, made when needed.
    `instruction`: the text that its features depend on, for models that read it (InstructBLIP). `features`: where they were made
    beforehand, for that instruction, and `owner` the store that made them.
    """

    kind: str
    content: str
    source: Any
    layout: EncodedImage
    arrays: dict[str, Array] | None = None
    instruction: str | None = None
    features: Features | None = None
    owner: object = None

    @property
    def key(self) -> str:
        """What its features are kept by: the content, and the instruction they depend on."""
        return self.content if self.instruction is None else f"{self.content}/{digest(self.instruction.encode())}"

    @property
    def content_id(self) -> int:
        """A negative 63-bit number that stands for this content in the KV cache (token ids are never negative)."""
        return -1 - number(self.key)


@dataclass(slots=True, frozen=True)
class Features:
    """What the graphs make of one medium.

    `values`: the last graph's first output, as it gives it for this medium alone: `[1, …]`, `[tiles, …]` or `[tokens, …]`.
    `others`: by name, that graph's further outputs, and what the memory's graphs read besides.
    """

    values: Array
    others: Mapping[str, Array] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory taken."""
        return self.values.nbytes + sum(array.nbytes for array in self.others.values())


@dataclass(slots=True, frozen=True)
class Encoded:
    """Features by medium key, and how many media were encoded for them."""

    features: dict[str, Features]
    encoded: int


Encode = Callable[[list[Medium], Callable[[], None]], list[Features]]
"""Runs the graphs on media with arrays; calls its second argument between runs, which may raise to stop."""


class Reader(Protocol):
    """Opens and preprocesses one kind of input. `fingerprint` tells apart options that give other arrays for the same input."""

    kind: str
    fingerprint: str

    def open(self, source: Any) -> tuple[Any, str]:
        """What was passed in, decoded, and a digest of it. Raises ImageError or PromptError."""

    def process(self, opened: Any) -> EncodedImage:
        """The first graph's inputs, and how the input was cut up."""


class MediaStore:
    """Decodes, preprocesses and encodes one kind of input, and remembers the features of those seen before in `kept`.

    `variant` tells apart features that differ for the same content (the build). Safe to use from several threads; one of
    them encodes at a time.
    """

    def __init__(self, reader: Reader, encode: Encode, *, variant: str, kept: ByteLRU[str, Any]) -> None:
        self.processor = reader.process
        self._reader = reader
        self._encode = encode
        self._prefix = f"{reader.kind}/{reader.fingerprint}/{variant}/"
        self._kept = kept
        self._layouts: ByteLRU[str, EncodedImage] = ByteLRU(_KEPT_LAYOUTS)
        self._encoding = threading.Lock()

    def open(self, source: Any) -> Medium:
        """Opens and measures one input. Raises ImageError or PromptError when it is none."""
        if isinstance(source, Medium):
            if source.owner not in (None, self):
                raise PromptError("these inputs were prefetched by another session: use the one that is asked.")
            return source
        opened, content = self._reader.open(source)
        content = self._prefix + content
        layout = self._layouts.get(content)
        if layout is not None:
            return Medium(self._reader.kind, content, opened, layout)
        processed = self._reader.process(opened)
        layout = replace(processed, arrays={})
        self._layouts.put(content, layout, 1)
        return Medium(self._reader.kind, content, opened, layout, None if content in self._kept else processed.arrays)

    def features(self, media: Sequence[Medium], between: Callable[[], None] = lambda: None) -> Encoded:
        """Features of every medium, each content encoded at most once. `between` is called between graph runs."""
        with self._encoding:
            return self._look_up_or_encode(media, between)

    @property
    def bytes(self) -> int:
        """Memory of the kept features (of all stores that keep theirs in the same place)."""
        return self._kept.bytes

    def clear(self) -> None:
        """Forgets all features and layouts."""
        self._kept.clear()
        self._layouts.clear()

    def _look_up_or_encode(self, media: Sequence[Medium], between: Callable[[], None]) -> Encoded:
        found: dict[str, Features] = {}
        missing: dict[str, Medium] = {}
        for medium in media:
            if medium.key in found or medium.key in missing:
                continue
            cached = medium.features or self._kept.get(medium.key)
            if cached is not None:
                found[medium.key] = cached
            else:
                missing[medium.key] = medium
        for medium in missing.values():
            if medium.arrays is None:
                medium.arrays = self._reader.process(medium.source).arrays
        for medium, features in zip(missing.values(), self._encode(list(missing.values()), between), strict=True):
            found[medium.key] = features
            self._kept.put(medium.key, features, features.bytes)
        for medium in media:
            medium.arrays = None
        return Encoded(found, len(missing))


def digest(content: bytes) -> str:
    """A short hash of bytes, as hex."""
    return hashlib.blake2b(content, digest_size=20).hexdigest()


def number(key: str) -> int:
    """A 63-bit number for a key: equal keys, equal numbers; others differ but for an accident of 1 in 2⁶³."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
