"""How a built graph's distance to the portable one is measured."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_edge.targets.selfcheck import Difference
from vlm_edge_runtime.errors import TargetError


def test_fillers_of_masks_do_not_hide_a_difference():
    difference = Difference()
    difference.add(np.array([-3.4e38, 1.0, 2.5]), np.array([-3.4e38, 1.0, 2.0]))
    assert difference.relative == pytest.approx(0.25)


def test_a_filler_on_one_side_only_is_a_difference():
    difference = Difference()
    difference.add(np.array([-3.4e38, 1.0]), np.array([0.5, 1.0]))
    assert difference.relative > 1e30


def test_nan_is_infinitely_far_and_another_shape_an_error():
    difference = Difference()
    difference.add(np.array([np.nan]), np.array([1.0]))
    assert difference.max_abs == float("inf") and difference.cosine == -1.0
    with pytest.raises(TargetError, match="shape"):
        difference.add(np.zeros((1, 2)), np.zeros((2, 1)))
