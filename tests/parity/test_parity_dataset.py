"""Datasets: files, answers, retrieval."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from vlm_edge.parity.dataset import Pair, Question, load_dataset, retrieval
from vlm_edge_runtime.errors import ParityError


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    return tmp_path


def write(folder, *lines):
    path = folder / "set.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_questions(folder):
    path = write(
        folder, {"image": "a.png", "prompt": "p", "answer": "x"}, "", {"images": ["a.png", "a.png"], "prompt": "q", "answer": "y"}
    )
    dataset = load_dataset(path)
    assert len(dataset) == 2
    first, second = dataset
    assert isinstance(first, Question) and first.prompt == "p" and first.images[0].size == (4, 4)
    assert len(second.images) == 2
    assert len(list(dataset)) == 2  # can be read again


def test_captions(folder):
    (pair,) = load_dataset(write(folder, {"image": "a.png", "text": "red"}))
    assert isinstance(pair, Pair) and pair.text == "red"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1"),
        ({"image": "a.png", "prompt": "p"}, "needs prompt and answer"),
        ({"prompt": "p", "answer": "x"}, "either image or images"),
        ({"images": ["a.png"], "text": "t"}, "one image"),
        ({"image": "a.png", "prompt": "p", "answer": "x", "label": 1}, "label"),
        ([1], "line 1"),
    ],
)
def test_a_wrong_line_is_named(folder, line, said):
    with pytest.raises(ParityError, match=said):
        load_dataset(write(folder, line))


def test_files_that_are_not_there(folder):
    with pytest.raises(ParityError, match=r"missing\.jsonl cannot be read"):
        load_dataset(folder / "missing.jsonl")
    with pytest.raises(ParityError, match="empty"):
        load_dataset(write(folder, ""))
    with pytest.raises(ParityError, match=r"b\.png"):
        list(load_dataset(write(folder, {"image": "b.png", "text": "t"})))
    with pytest.raises(ParityError, match="mixes"):
        load_dataset(write(folder, {"image": "a.png", "text": "t"}, {"image": "a.png", "prompt": "p", "answer": "x"}))


def test_answers_are_normalised():
    question = Question((), "how many?", "Three")
    assert question.is_right(" three.\n")
    assert not question.is_right("three or four")
    assert not question.is_right("")


def test_options_must_be_named_alone_and_as_words():
    question = Question((), "?", "red", ("red", "blue", "dark red"))
    assert question.is_right("It is red.")
    assert not question.is_right("It is red or blue")
    assert not question.is_right("it was covered")
    assert not question.is_right("it is dark red")


def test_retrieval_counts_both_ways_and_ties_as_misses():
    vectors = np.eye(4, dtype=np.float32)
    assert retrieval(vectors, vectors) == [True] * 8
    assert retrieval(vectors, vectors[::-1]) == [False] * 8
    same = np.ones((2, 3), np.float32)
    assert retrieval(same, same) == [False] * 4
    assert retrieval(np.full((2, 3), np.nan, np.float32), same) == [False] * 4
    assert retrieval(vectors, vectors[[1, 0, 3, 2]], pool=1) == [True] * 8  # alone in a pool nothing competes
