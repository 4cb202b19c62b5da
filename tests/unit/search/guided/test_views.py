"""One resource, another one, and several at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_surrogate import a_table, random_levels, truth

from autocompress.core import LATENCY, STORAGE
from autocompress.fronts import hypervolume
from autocompress.search.guided.archive import Measured
from autocompress.search.guided.features import OptionFeatures
from autocompress.search.guided.guide import Guide
from autocompress.search.guided.views import views

N_LEVELS = 5


def timed_table():
    """Computing bounds the time of narrow options; half of the layers are slow for their size."""
    table = a_table()
    times = tuple(
        0.37 * np.maximum(cost, 4000.0) * (1.0 if i % 2 else 0.1)
        for i, cost in enumerate(table.cost(STORAGE))
    )
    return replace(
        table, costs={**table.costs, LATENCY: times}, fixed={**table.fixed, LATENCY: 7.0}
    )


TABLE = timed_table()
MEASURE = truth(TABLE, by_choice=0.5)


def point(levels, resources):
    return (MEASURE(levels), *(TABLE.total(name, levels.tolist()) for name in resources))


def volume(trials, resources):
    worst = [sum(float(c.max()) for c in TABLE.cost(name)) for name in resources]
    points = [point(levels, resources) for levels in trials]
    return hypervolume(
        [(loss, *np.divide(c, worst)) for loss, *c in points], (1, 1.1, 1.1)[: 1 + len(worst)]
    )


def run(resources, n=12, seed=0):
    guide = Guide(TABLE, seed=seed, resources=resources)
    trials = [np.full(len(TABLE.names), level) for level in range(N_LEVELS)]
    for number, levels in enumerate(trials):
        guide.tell(number, seen(levels, is_rival=True))
    for number in range(N_LEVELS, N_LEVELS + n):
        proposal = guide.ask(number)
        trials.append(proposal.levels)
        guide.tell(number, seen(proposal.levels))
    return guide, trials


def seen(levels, *, is_rival=False):
    damage = float(np.exp(MEASURE(levels)))
    return Measured(levels, 0.0, damage, float(np.exp(-damage)), is_rival=is_rival)


@pytest.mark.parametrize("resources", [(LATENCY,), (STORAGE, LATENCY)], ids=["one", "two"])
def test_over_times_of_a_roofline_the_guide_beats_random_levels(resources):
    _, trials = run(resources)
    uniform, drawn = trials[:N_LEVELS], list(random_levels(12, seed=1))
    ours, theirs = (volume([*uniform, *more], resources) for more in (trials, drawn))
    assert ours - volume(uniform, resources) > 2 * (theirs - volume(uniform, resources))


def test_a_mixture_weighs_each_resource_by_the_range_it_has():
    features = OptionFeatures.of(TABLE)
    size, time, mixture = views(features, TABLE, (STORAGE, LATENCY))
    levels = random_levels(20, seed=2)
    spans = [sum(float(np.ptp(c)) for c in TABLE.cost(name)) for name in (STORAGE, LATENCY)]
    expected = size.total(levels) / spans[0] + time.total(levels) / spans[1]
    assert mixture.total(levels) == pytest.approx(expected)
    assert len(views(features, TABLE, (LATENCY,))) == 1


def test_levels_are_ranked_by_the_cost_of_the_view():
    _, time, _ = views(OptionFeatures.of(TABLE), TABLE, (STORAGE, LATENCY))
    levels = random_levels(9, seed=3)
    ranks = time.ranks(levels)
    assert (time.levels(ranks) == levels).all()
    dearer = time.levels(np.minimum(ranks + 1, N_LEVELS - 1))
    assert (time.total(dearer) >= time.total(levels)).all()


def test_one_of_three_proposals_takes_no_more_of_anything_than_a_baseline():
    guide, trials = run((STORAGE, LATENCY), n=9)
    rivals = [point(levels, (STORAGE, LATENCY))[1:] for levels in trials[:N_LEVELS]]
    for number in range(9, 12):  # the first turn of a new round aims, in each of the views
        cost = point(guide.ask(number).levels, (STORAGE, LATENCY))[1:]
        assert any(all(np.less_equal(cost, limits)) for limits in rivals)
