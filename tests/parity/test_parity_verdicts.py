"""What becomes of numbers: logits, texts, accuracy, graphs."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_edge.parity.accuracy import judge_accuracy
from vlm_edge.parity.metrics import UNBOUNDED, apart, compare_step, distance
from vlm_edge.parity.model import compare_texts, judge_logits, preprocessing_result
from vlm_edge.parity.report import CaseResult, ForcedResult, graph_result
from vlm_edge.parity.subject import Answer
from vlm_edge.parity.tolerance import tolerance
from vlm_edge_runtime.errors import ParityError

RANDOM = np.random.default_rng(0)


def forced(reference, found, precision):
    near = tolerance(precision).near_tie(float(np.abs(reference).max()))
    steps = [compare_step(a, b, near) for a, b in zip(reference, found, strict=True)]
    return [ForcedResult(example=0, words=["w"] * len(steps), steps=steps, scatter=[])]


def judged(reference, found, precision, **options):
    return judge_logits(forced(reference, found, precision), tolerance(precision), **options)


def logits(steps=40, vocabulary=50):
    return (RANDOM.normal(size=(steps, vocabulary)) * 4).astype(np.float32)


def test_equal_logits_pass():
    reference = logits()
    found = judged(reference, reference, "fp32")
    assert (found.verdict, found.agreement, found.mean_kl) == ("PASS", 1.0, 0.0)


def test_fp32_beyond_the_tolerance_fails():
    reference = logits()
    moved = reference.copy()
    moved[7, 3] += 0.01
    found = judged(reference, moved, "fp32")
    assert found.verdict == "FAIL"
    assert "0.0001 is allowed" in found.note


def test_fp32_flip_at_a_near_tie_is_ambiguous():
    reference = logits()
    reference[5, :2] = 20.0, 20.0 + 1e-4
    moved = reference.copy()
    moved[5, :2] = 20.0 + 1e-4, 20.0
    found = judged(reference, moved, "fp32")
    assert (found.verdict, found.near_ties, found.decided_flips) == ("AMBIGUOUS", 1, 0)


def test_nan_fails_whatever_the_precision():
    for precision in ("fp32", "int4"):
        reference = logits()
        broken = reference.copy()
        broken[2, 2] = np.nan
        found = judged(reference, broken, precision, accuracy_decides=True)
        assert found.verdict == "FAIL"
        assert found.distance.max_abs == UNBOUNDED
        assert np.isfinite(found.mean_kl)


def test_quantised_passes_with_an_error_that_fp32_may_not_have():
    reference = logits()
    moved = reference + (RANDOM.normal(size=reference.shape) * 0.05).astype(np.float32)
    assert judged(reference, moved, "fp32").verdict == "FAIL"
    assert judged(reference, moved, "int4").verdict == "PASS"


def test_quantised_fails_by_divergence_unless_accuracy_decides():
    reference = logits()
    moved = reference + (RANDOM.normal(size=reference.shape) * 2).astype(np.float32)
    found = judged(reference, moved, "int4")
    assert found.verdict == "FAIL"
    assert "mean KL" in found.note
    spared = judged(reference, moved, "int4", accuracy_decides=True)
    assert spared.verdict == "PASS"
    assert "task accuracy decides" in spared.note


def test_one_decided_flip_of_a_quantised_build_is_ambiguous():
    reference = logits()
    moved = reference.copy()
    reference[3, :2] = 21.0, 20.0
    moved[3, :2] = 20.0, 20.5
    assert judged(reference, moved, "int4").verdict == "AMBIGUOUS"


def test_no_step_is_an_error():
    with pytest.raises(ParityError, match="no step"):
        judge_logits([], tolerance("fp32"))


def text(found, reference, margin, precision, **options):
    scores = np.full((len(reference), 10), 5.0, np.float32)
    for i, token in enumerate(reference):
        scores[i, token] += margin
    answers = [Answer(found, "found")], [Answer(reference, "reference")], [scores]
    return compare_texts(*answers, tolerance(precision), **options)[0]


def test_equal_texts_pass():
    assert text([1, 2, 3], [1, 2, 3], 1.0, "fp32").verdict == "PASS"


def test_texts_that_diverge():
    clear = text([1, 4, 3], [1, 2, 3], 1.0, "fp32")
    assert (clear.verdict, clear.diverged_at, clear.margin) == ("FAIL", 1, 1.0)
    assert text([1, 4, 3], [1, 2, 3], 1e-5, "fp32").verdict == "AMBIGUOUS"
    assert text([1, 4, 3], [1, 2, 3], 1.0, "int4").verdict == "AMBIGUOUS"
    assert text([1, 4, 3], [1, 2, 3], 1.0, "int4", accuracy_decides=True).verdict == "PASS"
    shorter = text([1, 2], [1, 2, 3], 1.0, "fp32")
    assert (shorter.verdict, shorter.diverged_at) == ("FAIL", 2)


def test_accuracy():
    right, wrong = [True] * 200, [False] * 200
    assert judge_accuracy(right, right, "m").verdict == "PASS"
    assert judge_accuracy(right, wrong, "m").verdict == "PASS"  # better than the original
    lost = judge_accuracy([False] * 3 + [True] * 197, right, "m")
    assert (lost.verdict, lost.lost, lost.drop_points) == ("FAIL", 3, pytest.approx(1.5))
    assert judge_accuracy([False] * 2 + [True] * 198, right, "m").verdict == "PASS"  # exactly one point
    assert judge_accuracy([False] * 3 + [True] * 197, right, "m", allowed_points=2.0).verdict == "PASS"


def test_one_answer_of_few_shows_nothing():
    found = judge_accuracy([False] + [True] * 19, [True] * 20, "m")
    assert found.verdict == "AMBIGUOUS"
    assert "larger dataset" in found.note


def test_accuracy_of_nothing_is_an_error():
    with pytest.raises(ParityError):
        judge_accuracy([], [], "m")


def test_graphs():
    near, far = distance([1.00001], [1.0]), distance([1.1], [1.0])
    case = CaseResult(case="c", output="o", distance=near)
    wrong = CaseResult(case="c2", output="logits", distance=far)
    broken = CaseResult(case="c", output="o", distance=apart("NaN"))
    assert graph_result("decoder", "fp32", 1e-4, [case]).verdict == "PASS"
    failed = graph_result("decoder", "fp32", 1e-4, [case, wrong])
    assert failed.verdict == "FAIL"
    assert "logits on 'c2'" in failed.note
    assert graph_result("decoder", "int4", None, [case, wrong]).verdict == "PASS"
    assert graph_result("decoder", "int4", None, [broken]).verdict == "FAIL"
    assert graph_result("decoder", "fp32", 1e-4, []).verdict == "AMBIGUOUS"


def test_preprocessing():
    assert preprocessing_result([distance([1.0], [1.0])]).verdict == "PASS"
    moved = preprocessing_result([distance([1.0], [1.0]), distance([1.001], [1.0])])
    assert moved.verdict == "FAIL"
    assert "1 of 2 examples" in moved.note
    assert "prompts differ" in preprocessing_result([distance([1.0], [1.0])], tokens_differ=1).note
