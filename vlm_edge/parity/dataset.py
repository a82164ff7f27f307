"""Task accuracy: questions about pictures with known answers, or pairs of pictures and captions for dual encoders.

A dataset is a JSON Lines file, one object a line, pictures named relative to the file:

    {"image": "images/0.png", "prompt": "How many circles?", "answer": "three"}
    {"images": ["a.png", "b.png"], "prompt": "Which is larger?", "answer": "the first", "options": ["the first", "the second"]}
    {"image": "images/7.png", "text": "a red circle above a blue square"}

Lines with `text` make a retrieval set: each picture has to find its own text among those of its pool, and the reverse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from vlm_edge_runtime.errors import ParityError

POOL = 64
"""How many pairs compete in retrieval; the last pool may be smaller."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about pictures. With `options` the answer is right when it names the right option and no other."""

    images: tuple[Image.Image, ...]
    prompt: str
    answer: str
    options: tuple[str, ...] = ()

    def is_right(self, text: str) -> bool:
        """Normalised exact match; with options, the right one and only the right one occurs as whole words."""
        said, wanted = normalise(text), normalise(self.answer)
        if said == wanted:
            return True
        if not self.options:
            return False
        named = {normalise(option) for option in self.options if _contains(said, normalise(option))}
        # "the first" occurs inside "the first one": of options that contain each other the longest counts
        longest = {one for one in named if not any(one != other and _contains(other, one) for other in named)}
        return longest == {wanted}


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture and the text that belongs to it."""

    image: Image.Image
    text: str


class Dataset(Protocol):
    """Anything that can be iterated over more than once, with a length: all Question, or all Pair."""

    def __iter__(self) -> Iterator[Question | Pair]: ...

    def __len__(self) -> int: ...


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    image: str | None = None
    images: list[str] | None = None
    prompt: str | None = None
    answer: str | None = None
    options: list[str] = []
    text: str | None = None


class JsonLines:
    """A dataset file. Lines are checked at once; pictures are opened when they are reached."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ParityError(f"The dataset {path} cannot be read: {error}.") from None
        self._lines = [self._parse(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        if not self._lines:
            raise ParityError(f"The dataset {path} is empty; one JSON object a line is expected.")
        if len({line.text is None for line in self._lines}) > 1:
            raise ParityError(f"The dataset {path} mixes questions (answer) and captions (text); keep them in two files.")

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Question | Pair]:
        for line in self._lines:
            images = tuple(self._open(name) for name in ([line.image] if line.image is not None else line.images or []))
            if line.text is not None:
                yield Pair(images[0], line.text)
            else:
                yield Question(images, line.prompt or "", line.answer or "", tuple(line.options))

    def _parse(self, number: int, line: str) -> _Line:
        where = f"{self.path}, line {number}"
        try:
            found = msgspec.convert(json.loads(line), _Line)
        except (ValueError, msgspec.ValidationError) as error:
            raise ParityError(f"{where}: {error}. Expected {{image, prompt, answer}} or {{image, text}}.") from None
        if (found.image is None) == (found.images is None):
            raise ParityError(f"{where}: name either image or images.")
        if found.text is None and (found.prompt is None or found.answer is None):
            raise ParityError(f"{where}: a question needs prompt and answer (a caption has text).")
        if found.text is not None and found.image is None:
            raise ParityError(f"{where}: a caption belongs to one image.")
        return found

    def _open(self, name: str) -> Image.Image:
        try:
            with Image.open(self.path.parent / name) as image:
                image.load()
                return image
        except (OSError, Image.DecompressionBombError) as error:
            raise ParityError(f"{self.path} names the picture {name}, which cannot be opened: {error}.") from None


def load_dataset(path: str | Path) -> JsonLines:
    """Opens a JSON Lines dataset. Raises ParityError naming the line that is wrong."""
    return JsonLines(path)


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation at the ends: `" A red  circle."` → `a red circle`."""
    return re.sub(r"\s+", " ", text).strip().lower().strip(".,;:!?\"' ")


def retrieval(images: npt.NDArray[Any], texts: npt.NDArray[Any], *, pool: int = POOL) -> list[bool]:
    """Top-1 retrieval of unit vectors [n, dim] in pools: per pair first image → text, then text → image. A tie is a miss."""
    right: list[bool] = []
    for start in range(0, len(images), pool):
        scores = images[start : start + pool].astype(np.float64) @ texts[start : start + pool].astype(np.float64).T
        own = np.diag(scores)
        for axis in (1, 0):
            others = np.where(np.eye(len(own), dtype=bool), -np.inf, scores).max(axis=axis, initial=-np.inf)
            right += [bool(value) for value in own > others]  # NaN compares false: a miss
    return right


def _contains(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None
