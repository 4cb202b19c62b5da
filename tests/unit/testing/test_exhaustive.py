"""The exact front of a tiny model, and what heuristics make of it."""

from pathlib import Path

import numpy as np
import pytest

from autocompress.core import TrialRequest
from autocompress.core.errors import SpaceError
from autocompress.fronts import hypervolume, reference_point
from autocompress.search import SAMPLERS
from autocompress.search.option_table import STORAGE, OptionTable
from autocompress.search.solver import solve
from autocompress.search.study import baselines
from autocompress.testing.exhaustive import ExactFront, exact_space
from autocompress.testing.replay import ReplayDriver, ReplayTable

GOLDEN = Path(__file__).parents[2] / "golden" / "exact_front.npz"


@pytest.fixture(scope="module")
def exact():
    return ExactFront.load(GOLDEN)


def single_damages(exact):
    """Measured damage of each option with all other choices at 8 bits."""
    mildest = [len(c.options) - 1 for c in exact.space.choices]
    return tuple(
        np.array([
            exact.damages[exact.index([*mildest[:i], level, *mildest[i + 1 :]])]
            for level in range(len(choice.options))
        ])
        for i, choice in enumerate(exact.space.choices)
    )  # fmt: skip


def costs(exact):
    return tuple(np.array([float(o.storage_bytes) for o in c.options]) for c in exact.space.choices)


def volume(exact, rows):
    return hypervolume(exact.points[rows], reference_point(exact.points))


def test_the_golden_file_holds_every_allocation(exact):
    assert len(exact.damages) == exact.space.n_combinations == 4096
    assert (exact.damages > 0).all()
    assert exact.index(exact.levels[1234]) == 1234
    assert 20 < len(exact.best) < 400


def test_nothing_is_better_than_the_exact_front(exact):
    everything = volume(exact, np.arange(len(exact.damages)))
    assert volume(exact, exact.best) == pytest.approx(everything)


def test_the_solver_on_measured_singles_comes_near_the_exact_front(exact):
    damage, cost = single_damages(exact), costs(exact)
    budgets = np.linspace(exact.n_bytes.min(), exact.n_bytes.max(), 40)
    rows = [exact.index(solve(damage, cost, budget)) for budget in budgets]
    assert volume(exact, rows) / volume(exact, exact.best) > 0.95


@pytest.mark.parametrize("name", ["gradient-dp", "gradient-lp", "hawq", "greedy-kl", "amq"])
def test_peers_beat_random_against_the_exact_front(exact, name):
    shares = {which: searched(exact, which, 70) for which in (name, "random")}
    assert shares[name] > shares["random"]
    assert shares[name] > 0.9


def searched(exact, name, n_trials):
    """Share of the exact front's volume after some trials."""
    space = exact.space
    table = OptionTable(
        names=tuple(c.name for c in space.choices),
        roles=tuple("down" for _ in space.choices),
        depths=tuple(float(i > 2) for i in range(len(space.choices))),
        labels=tuple(tuple(o.label for o in c.options) for c in space.choices),
        damage=single_damages(exact), costs={STORAGE: costs(exact)}, fixed={STORAGE: 0.0},
    )  # fmt: skip
    sampler = SAMPLERS[name](space, seed=0, table=table)
    flat = np.concatenate(table.damage)
    driver = ReplayDriver(ReplayTable(space, flat, np.zeros((len(flat),) * 2), {}, 0, 64, "kl"))
    fixed = baselines(space)[1:]
    rows = []
    for number in range(n_trials):
        allocation = fixed[number][1] if number < len(fixed) else sampler.ask(number)
        source = f"baseline:{fixed[number][0]}" if number < len(fixed) else "s"
        levels = list(space.encode(allocation).values())
        rows.append(exact.index(levels))
        answered = driver.answer(TrialRequest(number, allocation, source))
        sampler.tell(with_damage(answered, exact.damages[rows[-1]]))
    return volume(exact, rows) / volume(exact, exact.best)


def with_damage(result, damage):
    from dataclasses import replace

    from autocompress.core import Measurement, Metrics

    quality = replace(result.metrics.quality, damage=Measurement(float(damage), 0.0))
    return replace(result, metrics=Metrics(quality, result.metrics.resources))


def test_levels_outside_the_space_are_refused(exact):
    with pytest.raises(SpaceError):
        exact.space.decode({c.name: 9 for c in exact.space.choices})


@pytest.mark.slow
def test_a_sample_of_the_golden_file_is_measured_again(exact):
    live = exact_space()
    assert live.space == exact.space
    rows = np.random.default_rng(0).choice(len(exact.damages), 24, replace=False)
    again = live.damages(exact.levels[rows].tolist())
    np.testing.assert_allclose(again, exact.damages[rows], rtol=1e-2, atol=1e-7)
