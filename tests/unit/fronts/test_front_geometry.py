from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from autocompress.core.errors import UsageError
from autocompress.fronts import Front, hypervolume, knee_index, non_dominated, reference_point


def test_a_nan_in_the_first_row_does_not_empty_the_front():
    assert non_dominated([[math.nan, 1], [1, 2], [2, 1]]).tolist() == [False, True, True]


def test_equal_points_are_both_kept():
    assert non_dominated([[1, 2], [1, 2], [2, 2]]).tolist() == [True, True, False]


def test_infinities_compare_like_numbers_in_any_dimension():
    # moocore by itself keeps the second point here.
    points = [[math.inf, -1, -1, -1], [math.inf, -1, -1, 0]]
    assert non_dominated(points).tolist() == [True, False]


def test_no_points_give_an_empty_mask():
    assert non_dominated(np.empty((0, 2))).tolist() == []


@pytest.mark.parametrize("function", [non_dominated, reference_point])
def test_points_must_be_a_matrix(function):
    with pytest.raises(UsageError, match=r"one row per point .* shape \(3,\)"):
        function([1.0, 2.0, 3.0])


def test_the_hypervolume_of_two_boxes_counts_their_overlap_once():
    assert hypervolume([[1, 3], [2, 2]], [4, 4]) == 3 * 1 + 2 * 2 - 2 * 1


@pytest.mark.parametrize("points", [np.empty((0, 2)), [[5, 0]], [[4, 4]], [[math.nan, 1]]])
def test_points_that_are_not_better_than_the_reference_add_nothing(points):
    assert hypervolume(points, [4, 4]) == 0.0


@pytest.mark.parametrize("reference", [[4], [4, 4, 4], [4, math.nan], [4, math.inf]])
def test_a_reference_point_must_fit_the_points(reference):
    with pytest.raises(UsageError, match=r"one finite coordinate per objective \(2\)"):
        hypervolume([[1, 1]], reference)


def test_a_reference_point_lies_beyond_the_worst_finite_point():
    points = [[0.0, 10.0], [1.0, 30.0], [math.nan, 99.0], [math.inf, 0.0]]
    assert reference_point(points) == pytest.approx((1.1, 32.0))
    assert reference_point([[0.0, -5.0]]) == pytest.approx((0.1, -4.5))
    assert hypervolume([[0.0, -5.0]], reference_point([[0.0, -5.0]])) > 0


@pytest.mark.parametrize(("points", "margin"), [([[math.nan, 1]], 0.1), ([[1, 1]], 0.0)])
def test_a_reference_point_needs_a_point_and_a_margin(points, margin):
    with pytest.raises(UsageError, match="at least one finite point with a margin above 0"):
        reference_point(points, margin)


def test_the_knee_is_where_more_bytes_stop_buying_quality():
    sizes = [10e6, 12e6, 14e6, 20e6, 40e6, 80e6]
    quality = [0.30, 0.70, 0.93, 0.96, 0.985, 0.999]
    assert knee_index(sizes, quality) == 2


def test_the_ends_are_no_knee():
    assert knee_index([8], [0.5]) == 0
    assert knee_index([8, 16], [0.5, 0.9]) == 1
    sagging = knee_index([1, 2, 4, 8, 16], [0.0, 0.05, 0.1, 0.2, 1.0])
    assert sagging == 4


def test_of_equal_points_the_first_one_is_the_knee():
    assert knee_index([4, 4, 4], [0.9, 0.9, 0.9]) == 0


def test_points_with_a_nan_are_no_candidates_for_the_knee():
    assert knee_index([1, 2, 3, 4], [0.0, math.nan, 0.9, 1.0]) == 2


@pytest.mark.parametrize(
    ("sizes", "quality"),
    [([], []), ([1.0], [math.nan]), ([0.0], [0.5]), ([1.0, 2.0], [0.5])],
)
def test_a_knee_needs_points_with_size_and_quality(sizes, quality):
    with pytest.raises(UsageError, match="A knee is found among points"):
        knee_index(sizes, quality)


def test_a_front_holds_items_with_their_losses():
    losses = {"small": (1, 9), "large": (5, 1), "bad": (6, 9), "broken": (0, math.nan)}
    front = Front.of(losses, key=losses.__getitem__)
    assert list(front) == ["small", "large"]
    assert front.points == ((1.0, 9.0), (5.0, 1.0))
    assert front[1] == "large"
    assert front.hypervolume((10, 10)) == 9 * 1 + 5 * 9 - 5 * 1


def test_a_front_of_nothing_is_empty():
    front: Front[str] = Front.of([], key=lambda item: (0.0,))
    assert len(front) == 0
    assert front.hypervolume((1.0,)) == 0.0


def test_a_front_cannot_be_changed():
    front = Front.of(["x"], key=lambda item: (0.0, 1.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        front.members = ()
