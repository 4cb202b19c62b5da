"""The solver on problems whose answer is known, and on sizes that matter."""

from __future__ import annotations

import numpy as np
import pytest

from autocompress.core.errors import UsageError
from autocompress.search.solver import solve, solve_exactly, sweep


def random_problem(n_choices, n_options, seed=0):
    generator = np.random.default_rng(seed)
    damage, cost = [], []
    for _ in range(n_choices):
        damage.append(np.sort(generator.random(n_options))[::-1] * np.exp(generator.normal()))
        cost.append(np.cumsum(generator.integers(1, 9, n_options)).astype(float))
    return damage, cost


def test_the_sweep_takes_the_steps_that_save_most_per_byte_first():
    damage = [np.array([4.0, 1.0, 0.0]), np.array([10.0, 0.0])]
    cost = [np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0])]
    points = sweep(damage, cost)
    assert [points.at(i).tolist() for i in range(len(points))] == [[0, 0], [0, 1], [1, 1], [2, 1]]
    assert points.costs.tolist() == [2.0, 4.0, 5.0, 6.0]
    assert points.damages.tolist() == [14.0, 4.0, 1.0, 0.0]


def test_a_level_above_the_line_between_its_neighbours_is_on_no_supported_point():
    points = sweep([np.array([4.0, 3.5, 0.0])], [np.array([0.0, 1.0, 2.0])])
    assert [points.at(i).tolist() for i in range(len(points))] == [[0], [2]]


def test_local_search_fills_what_the_hull_leaves():
    """The hull skips the middle option, but it is what fits."""
    levels = solve([np.array([4.0, 3.5, 0.0])], [np.array([0.0, 1.0, 2.0])], 1.5)
    assert levels.tolist() == [1]


def test_a_pair_of_moves_is_found_where_no_single_one_helps():
    damage = [np.array([5.0, 0.0]), np.array([3.0, 0.0])]
    cost = [np.array([0.0, 10.0]), np.array([0.0, 2.0])]
    # Per unit of cost the second choice comes first and then blocks the first one.
    assert solve(damage, cost, 10.0).tolist() == [1, 0]


def test_the_solver_is_near_the_optimum_on_average():
    ratios = []
    for seed in range(40):
        damage, cost = random_problem(12, 5, seed)
        budget = int(0.5 * sum(c[0] + c[-1] for c in cost))
        exact = solve_exactly(damage, [c.astype(np.int64) for c in cost], budget)
        found = solve(damage, cost, budget)
        value = [sum(d[i] for d, i in zip(damage, x, strict=True)) for x in (found, exact)]
        assert value[0] >= value[1] - 1e-12
        ratios.append(value[0] / value[1])
    assert np.mean(ratios) < 1.01


def test_a_large_model_has_many_supported_points():
    damage, cost = random_problem(560, 30)
    points = sweep(damage, cost)
    assert len(points) > 1000
    last = points.at(len(points) - 1)
    assert sum(d[i] for d, i in zip(damage, last, strict=True)) == pytest.approx(points.damages[-1])


def test_a_budget_below_the_least_names_the_least():
    with pytest.raises(UsageError, match=r"can cost is 3, but the limit is 2"):
        solve([np.array([1.0])], [np.array([3.0])], 2.0)


def test_a_table_of_decisions_that_is_too_large_is_refused():
    with pytest.raises(UsageError, match="round the costs"):
        solve_exactly([np.array([1.0, 0.0])], [np.array([0, 10**9])], 10**9)
