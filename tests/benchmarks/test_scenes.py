"""The scenes are the yardstick of every accuracy: seeded, split without overlap, and usable without torch."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.train import easyvqa, scenes

ROOT = Path(__file__).parents[2]
PHRASES = [f"{colour} {shape}" for colour, shape in scenes.HELD_OUT_PAIRS]


def drawn(split, n=3000, seed=3, grid=(4, 4)):
    rng = random.Random(seed)
    return [scenes.sample(rng, split, *grid) for _ in range(n)]


@pytest.mark.parametrize(("model", "sizes"), [("llava", {(64, 64)}), ("smolvlm", {(128, 128), (128, 64), (64, 128)})])
def test_examples_depend_on_the_seed_alone(model, sizes):
    once, again = (scenes.held_out_examples(40, 5, model) for _ in range(2))
    assert [(e.prompt, e.answer, e.image.tobytes()) for e in once] == [(e.prompt, e.answer, e.image.tobytes()) for e in again]
    assert {e.image.size for e in once} == sizes
    other = scenes.held_out_examples(40, 6, model)
    assert [e.answer for e in once] != [e.answer for e in other]


def test_no_test_composition_is_drawn_or_named_in_training():
    train, test = drawn("train"), drawn("test")
    composed = {s.caption for s in test if len(s.things) > 1 or s.things[0].shape != "digit"}
    assert not composed & {s.caption for s in train}
    images = [{t.digit_image for s in side for t in s.things if t.digit_image >= 0} for side in (train, test)]
    assert images[0] and images[1] and not images[0] & images[1]
    rng = random.Random(4)
    texts = [" ".join((s.caption, *(" ".join(pair) for pair in scenes.questions(s, rng, "train")))) for s in train]
    assert not [text for text in texts for phrase in PHRASES if phrase in text]


def test_test_scenes_cover_every_kind():
    test = drawn("test", 1000)
    assert {s.relation for s in test} == {"", "left of", "above"}
    assert {len(s.things) for s in test} == {1, 2, 3, 4}
    assert {t.digit for s in test for t in s.things} == {-1, *range(10)}


def test_relations_hold_and_things_stand_in_different_cells():
    for scene in drawn("train", 500, grid=(4, 2)):
        places = {(t.column, t.row) for t in scene.things}
        assert len(places) == len(scene.things)
        if scene.relation:
            first, second = scene.things
            across, down = second.column - first.column, second.row - first.row
            assert (across > abs(down)) if scene.relation == "left of" else (down > abs(across))


def test_answers_follow_from_the_things():
    rng = random.Random(8)
    for scene in drawn("test", 500):
        for question, answer in scenes.questions(scene, rng, "test"):
            if question.startswith("how many"):
                shape = question.split()[2].removesuffix("s")
                assert answer == scenes.NUMBERS[sum(t.shape == shape for t in scene.things)]
            if question == "is there a digit?":
                assert answer == ("yes" if "digit" in scene.caption else "no")
            if question.startswith("where is") and answer in ("left", "above"):
                assert scene.caption.startswith((f"a {question.split()[3]}", "the digit"))


def test_retrieval_pools_hold_different_captions():
    captions = [caption for _, caption in scenes.held_out_captions(64, 1)]
    assert len(set(captions)) == 64


def test_easy_vqa_is_the_published_split():
    pytest.importorskip("easy_vqa")
    examples = easyvqa.test_examples()
    assert len(examples) == 9673
    assert len(easyvqa.questions("train")) == 38575
    assert {e.answer for e in examples} == set(easyvqa.answers()) and len(easyvqa.answers()) == 13
    assert {e.image.size for e in easyvqa.test_examples(20)} == {(64, 64)}


def test_data_need_no_torch():
    code = (
        "import sys; from benchmarks.train import easyvqa, scenes as s; s.held_out_examples(4); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
