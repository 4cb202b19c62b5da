"""Distributions over options, trained by gradients through the model."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from autocompress.core.errors import UsageError
from autocompress.evaluate import TASKS
from autocompress.models import describe
from autocompress.search import SAMPLERS
from autocompress.search.dnas.preferences import Preference, from_predictions, trade_offs
from autocompress.search.dnas.training import Training, train_preferences, trained_table
from autocompress.search.option_table import STORAGE, OptionTable
from autocompress.spaces.space import SearchSpace
from autocompress.testing.exhaustive import ExactFront, exact_space


@pytest.fixture(scope="module")
def live():
    """Three choices of three widths: rtn with 2, 3 or 4 bits in the first block of a tiny llama."""
    whole = exact_space()
    choices = tuple(replace(c, options=c.options[:3]) for c in whole.space.choices[:3])
    return replace(whole, space=SearchSpace("small", "27 allocations", choices))


@pytest.fixture(scope="module")
def exact(live):
    return ExactFront.of(live.space, live.damages(live.all_levels))


@pytest.fixture(scope="module")
def table(exact):
    """Damages are those of the options alone, the other choices at 4 bits."""
    damage = tuple(
        exact.damages[[exact.index([2] * i + [k] + [2] * (2 - i)) for k in range(3)]]
        for i in range(3)
    )
    choices = exact.space.choices
    cost = tuple(np.array([float(o.storage_bytes) for o in c.options]) for c in choices)
    return OptionTable(
        names=tuple(c.name for c in choices), roles=("down",) * 3, depths=(0.0,) * 3,
        labels=tuple(tuple(o.label for o in c.options) for c in choices),
        damage=damage, costs={STORAGE: cost}, fixed={STORAGE: 100.0},
    )  # fmt: skip


def trained(live, table, *, weights=None, seed=0, **settings):
    dense = live._decoded()
    levels = {str(o.schemes[0]): i for i, o in enumerate(live.space.choices[0].options)}
    return train_preferences(
        live.module, describe(live.module), live.space, table,
        task=TASKS["causal-lm"], batches=[live.batch],
        dense=lambda name, scheme: dense[name, levels[str(scheme)]],
        seed=seed, training=Training(**{"sequences": 4, **settings}), weights=weights,
    )  # fmt: skip


def test_training_finds_what_exhaustive_search_finds_under_a_byte_limit(live, exact, table):
    limit = 0.5 * (exact.n_bytes.min() + exact.n_bytes.max())
    fitting = np.flatnonzero(exact.n_bytes <= limit)
    best = tuple(exact.levels[fitting[exact.damages[fitting].argmin()]].tolist())
    assert len(set(best)) > 1  # not a uniform allocation, which any method would name
    weights = trade_offs(table.damage, table.cost(STORAGE), 1)
    preferences = trained(live, table, weights=weights, steps=30, learning_rate=0.4)
    sampler = SAMPLERS["dnas"](
        live.space, seed=0, table=replace(table, preferences=preferences), aims=[100 + limit]
    )
    proposed = [sampler.encode(sampler.ask(n)) for n in range(2)]
    assert best in proposed


def test_equal_seeds_train_equal_distributions(live, table):
    settings = {"weights": (1e-6, 1e-5), "steps": 2, "straight_through": True}
    first, again, other = (trained(live, table, seed=s, **settings) for s in (3, 3, 4))
    assert [p.to_json() for p in first] == [p.to_json() for p in again]
    assert [p.to_json() for p in first] != [p.to_json() for p in other]
    for preference in first:
        for row in preference.log_probabilities:
            assert np.exp(row).sum() == pytest.approx(1)


def test_draws_of_straight_through_training_are_whole_options(live, table, monkeypatch):
    seen = []
    from autocompress.search.dnas import training as module

    plain = module.mixed
    monkeypatch.setattr(
        module, "mixed", lambda m, parts, p: (seen.append(p), plain(m, parts, p))[1]
    )
    trained(live, table, weights=(1e-6,), steps=1, straight_through=True)
    trained(live, table, weights=(1e-6,), steps=1)
    hard, soft = ([row.detach().max() for row in rows] for rows in seen)
    assert all(value == pytest.approx(1, abs=1e-6) for value in hard)
    assert all(value < 0.999 for value in soft)


def test_a_pass_is_kept_and_a_damaged_one_is_done_again(table, tmp_path, caplog):
    calls = []

    def train():
        calls.append(1)
        return from_predictions(table.damage, table.cost(STORAGE))

    first = trained_table(table, train, facts=["a"], cache=tmp_path)
    assert len(first.preferences) > 1
    again = trained_table(table, train, facts=["a"], cache=tmp_path)
    assert (len(calls), again.digest) == (1, first.digest)
    trained_table(table, train, facts=["b"], cache=tmp_path)
    assert len(calls) == 2
    for path in tmp_path.iterdir():
        path.write_text("{", encoding="utf-8")
    assert trained_table(table, train, facts=["a"], cache=tmp_path).digest == first.digest
    assert len(calls) == 3
    assert "done again" in caplog.text
    assert OptionTable.from_json(first.to_json()).digest == first.digest != table.digest


def test_trade_offs_are_slopes_of_the_predicted_front(table):
    weights = trade_offs(table.damage, table.cost(STORAGE))
    assert list(weights) == sorted(weights)
    assert weights[0] > 0
    assert trade_offs((np.zeros(1),), (np.ones(1),)) == (0.0,)


def test_predictions_alone_prefer_the_least_sum(table):
    cost = table.cost(STORAGE)
    for preference in from_predictions(table.damage, cost):
        sums = {
            levels: sum(
                d[k] + preference.weight * c[k]
                for d, c, k in zip(table.damage, cost, levels, strict=True)
            )
            for levels in itertools.product(range(3), repeat=3)
        }
        assert sums[preference.best] == pytest.approx(min(sums.values()))
    never = Preference(1.0, (np.array([0.0, -np.inf]),))
    assert Preference.from_json(never.to_json()).log_probabilities[0].tolist() == [0.0, -np.inf]
    assert never.draw(np.random.default_rng(0)) == (0,)


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"temperatures": (0.1, 1.0)}, {"learning_rate": 0.0}]
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(UsageError, match="but got"):
        Training(**bad)
