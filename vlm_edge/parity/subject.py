"""The two sides of a comparison, whoever they are: PyTorch, the portable graphs, a build."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from .examples import Example

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Prepared:
    """An example as the model reads it. `pixels`: those of each picture, as the processor lays them out.

    `input_ids`: the tokens of the prompt as a processor gives them; `decoder_ids`: those that the decoder begins with, where it
    reads the prompt (a model's `generate` may rewrite what the processor gave).
    """

    input_ids: list[int]
    pixels: list[Array]
    decoder_ids: list[int] = field(default_factory=list)

    def reads_like(self, other: Prepared) -> bool:
        """Whether both read the same tokens: the processor's, or (where one side has only those) the decoder's."""
        return self.input_ids == other.input_ids or (bool(self.decoder_ids) and self.decoder_ids == other.decoder_ids)


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer: its tokens (an end token included, when it was reached) and their text without special tokens."""

    tokens: list[int]
    text: str


@dataclass(frozen=True, slots=True)
class GraphCase:
    """Inputs of one *portable* graph and what it has to give. `masks`: where an output counts (absent: everywhere)."""

    label: str
    feeds: dict[str, Array]
    expected: dict[str, Array]
    masks: dict[str, Array] = field(default_factory=dict)


class Generator(Protocol):
    """A side that answers in words."""

    name: str

    def prepare(self, example: Example) -> Prepared:
        """Preprocessing and tokens alone."""

    def forced(self, example: Example, answer: Sequence[int]) -> Floats:
        """Logits [len(answer), vocabulary] before each token of `answer`, which is fed token by token after the prompt."""

    def greedy(self, example: Example, max_new_tokens: int) -> Answer:
        """The most likely token each time, until an end token; no penalty, no sampling."""

    def words(self, tokens: Sequence[int]) -> list[str]:
        """Each token as text."""

    def close(self) -> None:
        """Frees what was loaded."""


class Encoder(Protocol):
    """A side that turns pictures and texts into vectors."""

    name: str

    def pixels(self, image: Image.Image) -> Array:
        """Preprocessing alone."""

    def embed_images(self, images: Sequence[Image.Image]) -> Floats:
        """Vectors of unit length [n, dim]."""

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        """Vectors of unit length [n, dim]."""

    def close(self) -> None:
        """Frees what was loaded."""


class GraphReference(Protocol):
    """A side that knows what each portable graph has to give."""

    name: str

    def graph_cases(self, role: str) -> Iterator[GraphCase]:
        """Inputs and right outputs of one graph, at several shapes."""
