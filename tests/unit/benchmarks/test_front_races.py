"""The share of a box that a front dominates."""

import pytest
from front_races import Box

BOX = Box(worst=1.0, most_bytes=100.0, floor=1e-2)


def test_shares_are_areas_in_log_damage_and_bytes():
    assert BOX.share([]) == 0
    assert BOX.share([(0.1, 50.0)]) == pytest.approx(0.25)
    assert BOX.share([(0.1, 50.0), (1e-2, 75.0)]) == pytest.approx(0.25 + 0.125)


def test_damage_below_the_floor_counts_as_the_floor():
    assert BOX.share([(1e-9, 50.0)]) == pytest.approx(BOX.share([(1e-2, 50.0)]))


def test_what_is_worse_than_the_corner_adds_nothing():
    assert BOX.share([(2.0, 10.0), (0.1, 200.0)]) == 0
