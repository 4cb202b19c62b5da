"""Expected improvement against sampling."""

from __future__ import annotations

import numpy as np
import pytest

from autocompress.search.guided.improvement import Staircase


def a_staircase():
    costs = np.array([4.0, 2.0, 3.0, 9.0, 2.5])
    losses = np.array([1.0, 3.0, 2.0, 0.1, 5.0])
    return Staircase.of(costs, losses, (8.0, 4.0))


def test_only_what_is_not_dominated_and_inside_the_reference_counts():
    stairs = a_staircase()
    assert stairs.costs.tolist() == [2.0, 3.0, 4.0]
    assert stairs.losses.tolist() == [3.0, 2.0, 1.0]
    assert stairs.hypervolume == pytest.approx(1 * 1 + 1 * 2 + 4 * 3)


def test_an_empty_front_has_no_hypervolume():
    nothing = Staircase.of(np.empty(0), np.empty(0), (1.0, 1.0))
    assert nothing.hypervolume == 0.0
    assert nothing.expected_improvement(np.array([0.5]), np.array([0.0]), np.array([1e-9]))[
        0
    ] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("cost", "mean", "sd"), [(1.0, 3.5, 0.5), (3.5, 1.2, 1.0), (7.0, 1.0, 0.3)]
)
def test_it_is_the_mean_gain_of_hypervolume(cost, mean, sd):
    stairs = a_staircase()
    generator = np.random.default_rng(0)
    gains = []
    for loss in mean + sd * generator.standard_normal(4000):
        costs, losses = np.append(stairs.costs, cost), np.append(stairs.losses, loss)
        gains.append(Staircase.of(costs, losses, stairs.reference).hypervolume)
    simulated = np.mean(gains) - stairs.hypervolume
    exact = stairs.expected_improvement(np.array([cost]), np.array([mean]), np.array([sd]))[0]
    assert exact == pytest.approx(simulated, rel=0.1, abs=0.01)


def test_beyond_the_reference_nothing_is_gained():
    gain = a_staircase().expected_improvement(np.array([8.5]), np.array([-9.0]), np.array([0.1]))
    assert gain[0] == 0.0


@pytest.mark.parametrize("cost", [2.0, 3.5])
def test_at_one_cost_it_is_the_mean_gain_of_the_best_loss_there(cost):
    stairs = a_staircase()
    best = {2.0: 3.0, 3.5: 2.0}[cost]
    draws = 1.8 + 0.7 * np.random.default_rng(0).standard_normal(20_000)
    simulated = np.maximum(best - draws, 0).mean()
    candidates = np.array([1.9, cost, cost + 0.1])
    gains = stairs.expected_improvement_at(cost, candidates, np.full(3, 1.8), np.full(3, 0.7))
    assert gains[:2] == pytest.approx(simulated, rel=0.03)
    assert gains[2] == 0.0
