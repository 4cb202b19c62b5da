"""The surrogate against simulated truths, and its derivatives against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kendalltau

from autocompress.search.guided.features import OptionFeatures
from autocompress.search.guided.surrogate import Observations, Surrogate, Unknowns
from autocompress.search.option_table import OptionTable

ROLES = ("query", "down", "gate")
BITS = ("8", "6", "4", "3", "2")
N_BLOCKS = 8


def a_table(seed=0):
    generator = np.random.default_rng(seed)
    names, roles, depths, damage, cost = [], [], [], [], []
    for block in range(N_BLOCKS):
        for role in ROLES:
            names.append(f"{block}.{role}")
            roles.append(role)
            depths.append(block / (N_BLOCKS - 1))
            scale = np.exp(generator.normal() - 6)
            damage.append(scale * 4.0 ** (8 - np.array([8.0, 6, 4, 3, 2])) / 64)
            cost.append(np.array([8.0, 6, 4, 3, 2]) * 1000)
    return OptionTable(
        names=tuple(names),
        roles=tuple(roles),
        depths=tuple(depths),
        labels=(BITS,) * len(names),
        damage=tuple(damage),
        costs={"storage_bytes": tuple(cost)},
        fixed={"storage_bytes": 0.0},
    )


def truth(table, *, power=1.2, by_role=1.0, by_choice=0.0, seed=0):
    """What the model really loses: roles are wrongly predicted and errors compound."""
    generator = np.random.default_rng(seed)
    factor = dict(zip(ROLES, np.exp(by_role * np.array([-1.0, 1.0, 0.0])), strict=True))
    own = np.exp(by_choice * generator.normal(size=len(table.names)))
    true = [d * factor[r] * o for d, r, o in zip(table.damage, table.roles, own, strict=True)]

    def measure(levels):
        return np.log(0.7 * sum(d[i] for d, i in zip(true, levels, strict=True)) ** power)

    return measure


def random_levels(n, seed):
    """Of all sizes: a random centre, and levels near it."""
    generator = np.random.default_rng(seed)
    center = generator.uniform(0, 4, size=(n, 1))
    around = center + generator.normal(size=(n, len(ROLES) * N_BLOCKS))
    return np.clip(np.round(around), 0, 4).astype(np.int64)


def fitted(table, measure, n, seed=1):
    levels = random_levels(n, seed)
    data = Observations(levels, np.array([measure(x) for x in levels]), np.zeros(n))
    return Surrogate(OptionFeatures.of(table), data)


def test_without_measurements_it_predicts_the_sum_of_predicted_damages():
    table = a_table()
    nothing = Observations(
        np.empty((0, len(table.names)), dtype=np.int64), np.empty(0), np.empty(0)
    )
    surrogate = Surrogate(OptionFeatures.of(table), nothing)
    levels = random_levels(5, 3)
    mean, sd = surrogate.predict(levels)
    assert mean == pytest.approx(np.log([table.predicted(x) for x in levels]))
    assert (sd > 0.5).all()


def test_measurements_correct_roles_and_find_how_errors_compound():
    table = a_table()
    measure = truth(table)
    surrogate = fitted(table, measure, 40)
    levels = random_levels(60, 9)
    mean, sd = surrogate.predict(levels)
    actual = np.array([measure(x) for x in levels])
    uncorrected = np.array([np.log(table.predicted(x)) for x in levels])
    assert np.abs(mean - actual).mean() < 0.25 * np.abs(uncorrected - actual).mean()
    assert surrogate.power == pytest.approx(1.2, abs=0.15)
    assert (sd < 0.5).all()


def test_ranking_beats_that_of_the_prediction_alone():
    table = a_table()
    measure = truth(table, by_choice=0.5)
    levels = random_levels(80, 9)
    actual = [measure(x) for x in levels]
    mean, _ = fitted(table, measure, 60).predict(levels)
    alone = [table.predicted(x) for x in levels]
    assert kendalltau(mean, actual).statistic > max(0.9, kendalltau(alone, actual).statistic)


def test_the_stated_uncertainty_covers_the_error():
    table = a_table()
    measure = truth(table, by_choice=0.4)
    levels = random_levels(100, 9)
    mean, sd = fitted(table, measure, 30).predict(levels)
    score = (np.array([measure(x) for x in levels]) - mean) / sd
    assert np.mean(np.abs(score) < 2) > 0.85
    assert 0.2 < np.std(score) < 1.6


def test_more_measurements_leave_less_uncertainty():
    table = a_table()
    measure = truth(table)
    levels = random_levels(20, 9)
    few, many = (fitted(table, measure, n).predict(levels)[1].mean() for n in (6, 60))
    assert many < few


def test_a_trial_that_saw_few_tokens_counts_for_less():
    table = a_table()
    levels = random_levels(12, 1)
    good = np.array([truth(table)(x) for x in levels])
    wrong = good.copy()
    wrong[0] += 2.0
    probe = levels[:1]

    def predicted(extra):
        sd = np.zeros(12)
        sd[0] = extra
        return float(
            Surrogate(OptionFeatures.of(table), Observations(levels, wrong, sd)).predict(probe)[0][
                0
            ]
        )

    assert abs(predicted(5.0) - good[0]) < abs(predicted(0.0) - good[0])


def test_the_jacobian_is_the_derivative():
    table = a_table()
    features = OptionFeatures.of(table)
    surrogate = fitted(table, truth(table), 10)
    levels = random_levels(4, 5)
    mean, jacobian = surrogate._linearised(surrogate._mode, levels)
    generator = np.random.default_rng(0)
    direction = Unknowns.draw(features, generator)
    step = 1e-6
    small = Unknowns(*(step * part for part in direction.parts))
    predicted = jacobian.times(small, features, surrogate._scale)
    surrogate._mode = surrogate._mode.plus(small)
    moved, _ = surrogate._linearised(surrogate._mode, levels)
    assert (moved - mean) / step == pytest.approx(predicted / step, rel=1e-3, abs=1e-3)


def test_the_kernel_and_the_adjoint_agree_with_the_product():
    """<J u, w> = <u, J^T w>, and the kernel is J J^T."""
    table = a_table()
    features = OptionFeatures.of(table)
    surrogate = fitted(table, truth(table), 10)
    jacobian = surrogate._linearised(surrogate._mode, random_levels(4, 5))[1]
    generator = np.random.default_rng(0)
    weights = generator.normal(size=4)
    pulled = jacobian.adjoint(weights, features, 0.7)
    direction = Unknowns.draw(features, generator)
    left = jacobian.times(direction, features, 0.7) @ weights
    right = sum(a @ b for a, b in zip(direction.parts, pulled.parts, strict=True))
    assert left == pytest.approx(right)
    kernel = jacobian.kernel(jacobian, 0.7)
    assert kernel @ weights == pytest.approx(jacobian.times(pulled, features, 0.7))
    assert np.diag(kernel) == pytest.approx(jacobian.variances(0.7))


def test_draws_scatter_around_the_mode_as_the_posterior_says():
    table = a_table()
    surrogate = fitted(table, truth(table), 30)
    generator = np.random.default_rng(0)
    drawn = np.log([surrogate.damages(generator)[0] for _ in range(200)])
    mode = np.log(surrogate.damages()[0])
    assert drawn.mean(0) == pytest.approx(mode, abs=0.2)
    assert (drawn.std(0) > 0.05).all()


def test_options_without_damage_cost_nothing_and_break_nothing():
    table = a_table()
    free = tuple(np.where(np.arange(5) == 0, 0.0, d) for d in table.damage)
    table = OptionTable(
        table.names, table.roles, table.depths, table.labels, free, table.costs, table.fixed
    )
    surrogate = fitted(table, truth(a_table()), 12)
    base = np.zeros((1, len(table.names)), dtype=np.int64)
    mean, sd = surrogate.predict(base)
    assert np.isfinite(mean).all()
    assert np.isfinite(sd).all()
    assert mean[0] < surrogate.predict(random_levels(1, 0))[0][0]
