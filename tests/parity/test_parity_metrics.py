"""Distances, divergences and near ties, by hand-made numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlm_edge.parity.metrics import (
    UNBOUNDED,
    compare_step,
    distance,
    first_choice,
    kl_divergence,
    largest_value,
    log_softmax,
    worst,
)
from vlm_edge.parity.tolerance import EXIT_CODES, loosest, overall, tolerance

FLOATS = hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(-1e3, 1e3, width=32))


def test_numbers_of_a_known_difference():
    found = distance([1.0, 2.0, -4.5], [1.0, 2.0, -4.0])
    assert found.max_abs == pytest.approx(0.5)
    assert found.relative == pytest.approx(0.5 / 4.0)
    assert found.cosine == pytest.approx(23 / math.sqrt((1 + 4 + 20.25) * 21))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_on_one_side_is_infinitely_far(bad, side):
    pair = [np.ones(4, np.float32), np.ones(4, np.float32)]
    pair[side] = np.array([1, 1, bad, 1], np.float32)
    found = distance(*pair)
    assert found.max_abs == found.relative == UNBOUNDED
    assert "1 of 4" in found.note
    assert not found.within(1e300)
    assert not worst([distance([1.0], [1.0]), found]).within(1e300)


def test_nan_on_both_sides_is_no_agreement():
    assert not distance([np.nan], [np.nan]).within(1e300)


def test_equal_infinities_and_mask_fillers_are_equal_and_set_no_scale():
    reference = np.array([1.0, -np.inf, -3.4e38, 2.0])
    assert distance(reference, reference).within(0.0)
    moved = reference.copy()
    moved[0] = 1.5
    assert distance(moved, reference).relative == pytest.approx(0.25)  # of 2, not of 3.4e38


def test_another_shape_is_infinitely_far():
    found = distance(np.zeros((2, 3)), np.zeros((3, 2)))
    assert not found.within(1e300)
    assert "[2, 3] instead of [3, 2]" in found.note


def test_zero_reference():
    assert distance([0.0], [0.0]).within(0.0)
    assert not distance([1e-30], [0.0]).within(1.0)


def test_mask_leaves_out_padding():
    assert distance([[9.0, 1.0]], [[0.0, 1.0]], [[False, True]]).within(0.0)
    assert not distance([[9.0, 1.0]], [[0.0, 1.0]]).within(0.1)


@given(FLOATS)
def test_a_tensor_is_at_no_distance_from_itself(values):
    assert distance(values, values).within(0.0)
    assert kl_divergence(values, values) == pytest.approx(0.0, abs=1e-9)


@given(FLOATS, st.integers(0, 2**31))
def test_kl_is_never_negative(values, seed):
    other = values + np.random.default_rng(seed).normal(size=values.shape).astype(np.float32)
    assert kl_divergence(values, other) >= 0


def test_kl_of_known_distributions():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    assert kl_divergence(np.log(p), np.log(q)) == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert log_softmax([1000.0, 1000.0]) == pytest.approx([-math.log(2)] * 2)


def test_kl_where_it_is_infinite_is_unbounded():
    assert kl_divergence([0.0, 0.0], [0.0, -np.inf]) == UNBOUNDED
    assert kl_divergence([0.0, 0.0], [np.nan, 0.0]) == UNBOUNDED
    assert kl_divergence([0.0, -np.inf], [0.0, -np.inf]) == 0.0  # an impossible token on both sides


def test_first_choice_and_margin():
    assert first_choice([1.0, 5.0, 3.0]) == (1, 2.0)
    assert first_choice([5.0, 5.0, 3.0]) == (0, 0.0)


def test_a_flip_is_a_near_tie_only_between_tokens_that_are_near():
    reference = [5.0, 4.9, 1.0]
    assert not compare_step(reference, reference, 0.2).flipped
    near = compare_step(reference, [4.9, 5.0, 1.0], 0.2)
    assert near.flipped and near.near_tie
    far = compare_step(reference, [4.9, 4.0, 6.0], 0.2)  # the reference's margin is small, but not towards this token
    assert far.flipped and not far.near_tie
    assert not compare_step(reference, [4.9, 5.0, 1.0], 0.05).near_tie


def test_nan_logits_are_a_decided_flip():
    step = compare_step([1.0, 2.0], [np.nan, 2.0], 10.0)
    assert step.flipped and not step.near_tie and step.kl == UNBOUNDED


def test_tolerances():
    assert tolerance("fp32").relative == 1e-4
    assert tolerance("fp16").relative == 1e-2
    assert tolerance("int8w") == tolerance("int8")
    assert tolerance("int4").quantised and not tolerance("fp16").quantised
    assert tolerance("something new") == tolerance("fp32")
    assert loosest(["fp32", "int8", "fp16"]).precision == "int8"
    assert loosest([]).precision == "fp32"
    assert tolerance("fp32").near_tie(10.0) == pytest.approx(2e-3)
    assert tolerance("int4").near_tie(10.0) == pytest.approx(math.log(1.5))


def test_the_worst_verdict_is_the_whole_and_has_an_exit_code_of_its_own():
    assert overall([]) == "PASS"
    assert overall(["PASS", "AMBIGUOUS"]) == "AMBIGUOUS"
    assert overall(["AMBIGUOUS", "FAIL", "PASS"]) == "FAIL"
    assert EXIT_CODES == {"PASS": 0, "FAIL": 1, "AMBIGUOUS": 2}


def test_the_size_of_logits_leaves_out_fillers_and_infinities():
    """Chameleon hides image tokens by the smallest float: a near tie must not be measured by that."""
    assert largest_value([-3.4e38, 2.0, -5.0, np.inf, np.nan]) == 5.0
    assert largest_value([-3.4e38]) == 0.0
