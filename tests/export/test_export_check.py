"""The comparison itself: what it calls equal, and that it fails loudly on what is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_edge.export import checkpoint
from vlm_edge.export.check import TOLERANCE, check, difference
from vlm_edge.families.base import GraphPlan
from vlm_edge_runtime.bundle.reader import open_bundle
from vlm_edge_runtime.errors import ExportError


def test_equal():
    one = difference([1.0, 2.0], [1.0, 2.0])
    assert (one.max_abs, one.scaled, one.within) == (0.0, 0.0, True)
    assert one.cosine == pytest.approx(1.0)


def test_scaled_by_the_reference_only_above_one():
    assert difference([100.005], [100.0]).scaled == pytest.approx(5e-5)
    assert difference([0.01 + 2 * TOLERANCE], [0.01]).within is False


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([np.nan, 1.0], [1.0, 1.0]),
        ([1.0, 1.0], [np.nan, 1.0]),
        ([np.nan], [np.nan]),
        ([np.inf], [1.0]),
        ([np.inf], [-np.inf]),
        ([1.0, 2.0], [1.0]),
    ],
)
def test_never_within(found, expected):
    assert not difference(found, expected).within


def test_equal_infinities_are_equal():
    assert difference([-np.inf, 1.0], [-np.inf, 1.0]).within


def test_masked_numbers_do_not_count():
    assert difference([[1.0], [np.nan]], [[1.0], [5.0]], [[True], [False]]).within


def test_a_wrong_graph_is_named_with_case_and_numbers(tiny_checkpoint, portable_bundle):
    folder = tiny_checkpoint("llava-llama")
    config, entry, family = checkpoint.identify(folder, None, False)
    loaded = checkpoint.load(folder, family.auto_class, config)

    def projector() -> GraphPlan:
        """A plan remembers what its model answered: one for each state of the model."""
        return next(plan for plan in family.split(loaded, entry).graphs if plan.role == "projector")

    plan = projector()
    file = open_bundle(portable_bundle("llava-llama")).graph_path("projector")
    assert check(plan, loaded.model, file).verdict == "PASS"
    with torch.no_grad():
        loaded.model.model.multi_modal_projector.linear_1.bias[3] += 0.5
    with pytest.raises(ExportError, match=r"'projector', case '2 images': image_features differs .* 0\.0001 is allowed"):
        check(projector(), loaded.model, file)
