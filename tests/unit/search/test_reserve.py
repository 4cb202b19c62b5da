"""Time that is left for the report tokens."""

import pytest

from autocompress.search.reserve import Reserve


@pytest.mark.parametrize(
    ("n_members", "at_once", "n_measured"), [(0, 1, 5), (4, 1, 9), (40, 1, 10), (4, 2, 4.5)]
)
def test_a_reserve_is_for_all_that_is_measured_again(n_members, at_once, n_measured):
    reserve = Reserve(seconds_each=28.0, most_members=5, at_once=at_once)
    assert reserve.seconds(3, n_members) == pytest.approx(28 * n_measured)
