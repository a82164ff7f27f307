"""The students' lessons: tokens and pixels are what the checkpoint's own processor makes, and a step of training learns."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.train.students import STUDENTS
from benchmarks.train.teach import Lessons, train


@pytest.mark.parametrize("name", STUDENTS)
def test_lessons_are_the_processors(name: str) -> None:
    student = STUDENTS[name]
    torch.manual_seed(0)
    parts = student.build(0)
    lessons = Lessons(student, parts, 0)
    lessons.check(parts.processor)
    batch, targets = lessons.next()
    told = batch["labels"] != -100
    assert not (told & batch["prefix"]).any(), "the prompt is not learned"
    assert (batch["labels"][told] == batch["input_ids"][told]).all()
    assert told.any(1).all() and len(batch["labels"]) == student.batch * student.talks
    assert targets["shape"].shape == (student.batch, 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_training_learns(name: str) -> None:
    losses: list[float] = []
    train(STUDENTS[name], 0, 12, None, lambda step, seconds, found: losses.append(found["text"]))
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) < sum(losses[:3])
