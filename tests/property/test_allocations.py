"""Laws of the allocation solver; brute force and dynamic programming as references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autocompress.core.errors import UsageError
from autocompress.search.solver import solve, solve_exactly, sweep

laws = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)

values = st.integers(0, 40).map(float)


@st.composite
def problems(draw, most_choices=4, most_options=4):
    sizes = draw(st.lists(st.integers(1, most_options), min_size=1, max_size=most_choices))
    damage = [np.array(draw(st.lists(values, min_size=n, max_size=n))) for n in sizes]
    cost = [np.array(draw(st.lists(values, min_size=n, max_size=n))) for n in sizes]
    return damage, cost


def total(arrays, levels):
    return sum(float(a[level]) for a, level in zip(arrays, levels, strict=True))


def every(damage, cost):
    for levels in itertools.product(*(range(len(d)) for d in damage)):
        yield levels, total(damage, levels), total(cost, levels)


@laws
@given(problems())
def test_every_point_of_the_sweep_costs_and_damages_what_it_says(problem):
    damage, cost = problem
    points = sweep(damage, cost)
    for point in range(len(points)):
        levels = points.at(point)
        assert total(damage, levels) == pytest.approx(points.damages[point], abs=1e-9)
        assert total(cost, levels) == pytest.approx(points.costs[point], abs=1e-9)
    assert (np.diff(points.costs) > 0).all()
    assert (np.diff(points.damages) < 0).all()


@laws
@given(problems(), st.floats(0.01, 10))
def test_every_supported_point_is_found_and_nothing_is_below_them(problem, price):
    """For any price per unit of cost the best total lies on the sweep."""
    damage, cost = problem
    points = sweep(damage, cost)
    best = min(d + price * c for _, d, c in every(damage, cost))
    assert (points.damages + price * points.costs).min() == pytest.approx(best, abs=1e-9)


@laws
@given(problems(), st.integers(0, 160))
def test_the_exact_solver_is_brute_force(problem, budget):
    damage, cost = problem
    fitting = [d for _, d, c in every(damage, cost) if c <= budget]
    integers = [c.astype(np.int64) for c in cost]
    if not fitting:
        with pytest.raises(UsageError, match="least that these choices can cost"):
            solve_exactly(damage, integers, budget)
        return
    levels = solve_exactly(damage, integers, budget)
    assert total(cost, levels) <= budget
    assert total(damage, levels) == min(fitting)


@laws
@given(problems(), st.integers(0, 160))
def test_the_solver_fits_and_is_no_worse_than_the_supported_point_below(problem, budget):
    damage, cost = problem
    points = sweep(damage, cost)
    point = points.within(budget)
    if point is None:
        with pytest.raises(UsageError, match="least that these choices can cost"):
            solve(damage, cost, budget)
        return
    levels = solve(damage, cost, budget)
    assert total(cost, levels) <= budget + 1e-9
    assert total(damage, levels) <= points.damages[point] + 1e-9
