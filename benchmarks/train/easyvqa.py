"""The published easy-vqa data set (Victor Zhou, MIT, PyPI package ``easy-vqa``), read from the installed package.

64 x 64 images of one coloured shape, 13 answers, 38,575 training and 9,673 test questions on 4,000 and 1,000 images.
No torch is needed here.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks.train.scenes import Example, Split


@functools.cache
def data_folder() -> Path:
    """Return the data folder of the installed package; raise ``ModuleNotFoundError`` when it is not installed."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the easy-vqa data set is not installed: pip install easy-vqa")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


@functools.cache
def answers() -> tuple[str, ...]:
    """Return the 13 possible answers."""
    return tuple((data_folder() / "answers.txt").read_text().split())


@functools.cache
def questions(split: Split) -> tuple[tuple[str, str, int], ...]:
    """Return every (question, answer, image number) of ``split``, in the published order."""
    rows = json.loads((data_folder() / split / "questions.json").read_text())
    return tuple((str(q), str(a), int(i)) for q, a, i in rows)


@functools.cache
def image(split: Split, number: int) -> Image.Image:
    """Return one image in RGB, 64 x 64 pixels."""
    with Image.open(data_folder() / split / "images" / f"{number}.png") as file:
        return file.convert("RGB")


def by_image(split: Split) -> dict[int, list[tuple[str, str]]]:
    """Return the (question, answer) pairs of every image number."""
    grouped: dict[int, list[tuple[str, str]]] = {}
    for question, answer, number in questions(split):
        grouped.setdefault(number, []).append((question, answer))
    return grouped


def test_examples(limit: int | None = None) -> list[Example]:
    """Return the published test questions, all 9,673 or, evenly spread over them, ``limit``."""
    rows: Sequence[tuple[str, str, int]] = questions("test")
    if limit is not None and limit < len(rows):
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    return [Example(image("test", number), question, answer) for question, answer, number in rows]


test_examples.__test__ = False  # type: ignore[attr-defined]  # the name begins like a test's; pytest must not collect it
