"""The guided sampler on simulated models: it learns, repeats itself, never repeats a trial."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import optuna
import pytest
from test_surrogate import ROLES, a_table, truth

from autocompress.core import Allocation, Measurement, Metrics, Quality, Resource, Scheme
from autocompress.core.errors import UsageError
from autocompress.core.trial import TrialRequest, TrialResult, TrialStatus
from autocompress.search import SAMPLERS
from autocompress.search.guided.archive import Measured, MeasuredFront, Scale, observations
from autocompress.search.guided.guide import Guide
from autocompress.search.guided.sampler import GuidedSampler
from autocompress.search.solver import sweep
from autocompress.spaces import Choice, Option, SearchSpace

TABLE = a_table()


def bytes_of(levels):
    return TABLE.total("storage_bytes", levels)


def measured(measure, levels, predicted=None, *, is_rival=False):
    damage = float(np.exp(measure(levels)))
    cost = bytes_of(levels)
    retained = float(np.exp(-damage))
    return Measured(levels, cost, damage, retained, 0.0, predicted, is_rival=is_rival)


def run(n, seed=0, by_choice=0.5, tell_every=1, rivals=()):
    """A guide after the uniform allocations and n proposals, with all that was measured.

    Uniform allocations of the levels in `rivals` are there to be beaten.
    """
    table = a_table()
    measure = truth(table, by_choice=by_choice)
    guide = Guide(table, seed=seed)
    trials = []
    for level in range(5):
        levels = np.full(len(table.names), level)
        trials.append(measured(measure, levels, is_rival=level in rivals))
        guide.tell(level, trials[-1])
    waiting = []
    for number in range(5, 5 + n):
        proposal = guide.ask(number)
        trials.append(measured(measure, proposal.levels, proposal.log_damage))
        waiting.append((number, trials[-1]))
        if len(waiting) == tell_every:
            for item in waiting:
                guide.tell(*item)
            waiting = []
    return guide, trials


def hypervolume(trials):
    scale = Scale(safe_damage=0.005, broken_damage=1.2, largest=8000.0 * len(ROLES) * 8)
    return scale.staircase([(m.cost, m.damage) for m in trials]).hypervolume


def best_hypervolume():
    """Of the true front, which only the simulation knows."""
    table = a_table()
    measure = truth(table, by_choice=0.5)
    alone = [
        np.array([np.exp(measure(only(i, level)) / 1.2) for level in range(5)])
        for i in range(len(table.names))
    ]
    points = sweep(alone, table.cost("storage_bytes"))
    return hypervolume([measured(measure, points.at(i)) for i in range(len(points))])


def only(choice, level):
    """Levels that let one choice dominate: all others at their mildest."""
    levels = np.zeros(len(ROLES) * 8, dtype=np.int64)
    levels[choice] = level
    return levels


def test_few_trials_close_most_of_the_gap_between_uniform_and_the_best():
    _, trials = run(25)
    uniform, best = hypervolume(trials[:5]), best_hypervolume()
    assert hypervolume(trials) - uniform > 0.7 * (best - uniform)


def test_more_trials_never_make_the_front_worse_and_help():
    _, trials = run(40)
    volumes = [hypervolume(trials[:n]) for n in (5, 15, 25, 45)]
    assert volumes == sorted(volumes)
    assert volumes[-1] > volumes[1]


def test_the_same_tells_give_the_same_proposals():
    first, second = run(12)[1], run(12)[1]
    assert all((a.levels == b.levels).all() for a, b in zip(first, second, strict=True))


def test_a_replay_goes_on_as_the_first_run_would_have():
    guide, trials = run(12)
    again = Guide(a_table(), seed=0)
    for number, trial in enumerate(trials):
        again.tell(number, trial)
    assert (again.ask(17).levels == guide.ask(17).levels).all()


@pytest.mark.parametrize("in_flight", [1, 8])
def test_no_levels_are_proposed_twice(in_flight):
    _, trials = run(40, tell_every=in_flight)
    assert len({m.levels.tobytes() for m in trials}) == len(trials)


def test_running_trials_are_not_proposed_again_nearby():
    """Eight asks without a tell spread over the front instead of crowding at one size."""
    guide, _ = run(4)
    costs = {round(bytes_of(guide.ask(100 + i).levels)) for i in range(8)}
    assert len(costs) >= 6


def test_baselines_are_beaten_at_their_own_bytes():
    def best_at(trials, rival):
        return min(m.damage for m in trials if m.cost <= rival.cost)

    _, aimed = run(24, rivals=(1, 2))
    _, at_large = run(24)
    for rival in aimed[1:3]:
        assert best_at(aimed, rival) < 0.8 * rival.damage
    assert sum(best_at(aimed, r) for r in aimed[1:3]) < sum(
        best_at(at_large, r) for r in aimed[1:3]
    )


def test_baselines_that_another_one_beats_are_not_aimed_at():
    guide, trials = run(0)
    good, larger = trials[2], trials[1]
    guide.tell(7, replace(good, is_rival=True))
    guide.tell(8, replace(larger, damage=2 * good.damage, is_rival=True))
    for turn in range(30, 36):
        assert bytes_of(guide.ask(3 * turn).levels) <= good.cost
    guide.tell(9, replace(larger, damage=0.5 * good.damage, is_rival=True))
    assert any(bytes_of(guide.ask(3 * turn).levels) > good.cost for turn in range(40, 44))


def test_a_size_that_was_asked_for_gets_every_third_proposal():
    table = a_table()
    _, trials = run(6)
    wanted = 0.5 * (trials[1].cost + trials[2].cost)
    aimed = Guide(table, seed=0, aims=[wanted])
    for number, trial in enumerate(trials):
        aimed.tell(number, trial)
    costs = [bytes_of(aimed.ask(number).levels) for number in (12, 15, 18)]
    assert all(0.9 * wanted < cost <= wanted for cost in costs)


def test_predictions_are_compared_with_what_was_measured():
    guide, _ = run(3)
    assert guide.agreement() is None
    guide, _ = run(20)
    assert guide.agreement() > 0.5


def test_a_failed_trial_teaches_nothing_and_is_not_repeated():
    guide, _ = run(2)
    levels = guide.ask(50).levels
    before = guide.surrogate
    guide.forget(50, levels)
    assert guide.surrogate is before
    assert (guide.ask(51).levels != levels).any()


def test_of_many_trials_the_front_and_the_latest_are_fitted():
    table = a_table()
    measure = truth(table)
    generator = np.random.default_rng(0)
    trials = []
    for _ in range(700):
        trials.append(measured(measure, generator.integers(0, 5, len(table.names))))
    data = observations(trials, Scale(), len(table.names))
    assert len(data) == 320
    assert (data.levels[-1] == trials[-1].levels).all()
    front = MeasuredFront()
    for trial in trials[:-160]:
        front.add(trial)
    kept = {levels.tobytes() for levels in data.levels}
    assert all(m.levels.tobytes() in kept for m in front)


def test_differences_that_the_tokens_cannot_show_are_worth_nothing():
    def trials(error):
        pairs = [(8.0, 0.9999), (6.0, 0.998), (4.0, 0.99), (3.0, 0.9)]
        levels = np.zeros(1, dtype=np.int64)
        return [Measured(levels, c, 1 - r, r, 0.0, None, error) for c, r in pairs]

    exact, blurred = (Scale.of(trials(error), 10.0) for error in (0.0, 0.005))
    assert exact.largest == pytest.approx(1.02 * 8.0)
    assert blurred.largest == pytest.approx(1.02 * 6.0)
    assert blurred.safe_damage > 5 * exact.safe_damage


def test_the_front_is_kept_up_to_date():
    def point(cost, damage):
        return Measured(np.zeros(1, dtype=np.int64), cost, damage, 1.0)

    generator = np.random.default_rng(3)
    front = MeasuredFront()
    points = [point(*pair) for pair in generator.integers(1, 12, size=(60, 2)).astype(float)]
    for p in points:
        front.add(p)
    expected = {
        (p.cost, p.damage)
        for p in points
        if not any(
            (q.cost <= p.cost and q.damage <= p.damage) and (q.cost, q.damage) != (p.cost, p.damage)
            for q in points
        )
    }
    assert {(p.cost, p.damage) for p in front} == expected
    assert [p.cost for p in front] == sorted(p.cost for p in front)


# The package's sampler and Optuna's


def a_space():
    table = a_table()
    choices = []
    for name, labels, cost in zip(
        table.names, table.labels, table.cost("storage_bytes"), strict=True
    ):
        options = tuple(
            Option(label, (Scheme.parse(f"rtn(bits={label})"),), int(c))
            for label, c in zip(labels, cost, strict=True)
        )
        choices.append(Choice(name, (name,), options, 16000))
    return SearchSpace("simulated", "", tuple(choices))


def result(number, allocation, damage, cost, status=TrialStatus.COMPLETE, damages=(), state=None):
    quality = Quality(float(np.exp(-damage)), 0.0, Measurement(damage, 0.0), {}, 10)
    metrics = Metrics(quality, {"storage_bytes": Resource(cost, "bytes", "analytic")})
    return TrialResult(
        TrialRequest(number, allocation, "sampler:guided"),
        status,
        metrics,
        damages=damages,
        sampler_state=state or {},
    )


def test_without_a_table_of_its_space_it_says_what_to_do():
    with pytest.raises(UsageError, match="option table"):
        SAMPLERS["guided"](a_space(), seed=0)
    table = a_table()
    fewer = without_its_first_choice(table)
    with pytest.raises(UsageError, match="choices differ"):
        SAMPLERS["guided"](a_space(), seed=0, table=fewer)


def without_its_first_choice(table):
    return type(table)(
        table.names[1:],
        table.roles[1:],
        table.depths[1:],
        table.labels[1:],
        table.damage[1:],
        {"storage_bytes": table.cost("storage_bytes")[1:]},
        table.fixed,
    )


def test_the_sampler_stores_what_it_predicted_and_replays_from_results():
    space, table = a_space(), a_table()
    measure = truth(table)

    def told(sampler, number, allocation):
        levels = np.array(list(space.encode(allocation).values()))
        damage = float(np.exp(measure(levels)))
        finished = result(number, allocation, damage, bytes_of(levels), state=sampler.state(number))
        sampler.tell(finished)
        return finished

    sampler = SAMPLERS["guided"](space, seed=3, table=table)
    results = [told(sampler, n, allocation) for n, (_, allocation) in enumerate(space.baselines())]
    start = len(results)
    for number in range(start, start + 8):
        results.append(told(sampler, number, sampler.ask(number)))
    assert "predicted_log_damage" in results[-1].sampler_state
    assert "kendall_tau" in results[-1].sampler_state
    again = SAMPLERS["guided"](space, seed=3, table=table)
    for finished in results:
        again.tell(TrialResult.from_json(finished.to_json()))
    assert again.ask(start + 8) == sampler.ask(start + 8)


def test_an_early_stopped_trial_is_extrapolated_by_what_others_saw_later():
    space, table = a_space(), a_table()
    sampler = SAMPLERS["guided"](space, seed=0, table=table)
    uniform = dict(space.baselines())
    mild = next(iter(uniform.values()))
    # The second half of the tokens is three times as hard.
    sampler.tell(result(0, mild, 0.2, 100.0, damages=(1.0, 1.0, 3.0, 3.0)))
    asked = sampler.ask(1)
    sampler.tell(result(1, asked, 0.1, 90.0, status=TrialStatus.EARLY_STOPPED, damages=(1.0, 1.0)))
    learned = sampler._guide._views[0].trials[-1]
    assert learned.damage == pytest.approx(0.1 * 2.0)
    assert learned.extra_sd > 0


def test_allocations_outside_the_space_are_ignored():
    sampler = SAMPLERS["guided"](a_space(), seed=0, table=a_table())
    foreign = Allocation.of({"elsewhere": Scheme.parse("rtn(bits=4)")})
    sampler.tell(result(0, foreign, 0.2, 100.0))
    assert not sampler._guide._views[0].trials


def test_it_drives_an_optuna_study_of_ones_own():
    table = a_table()
    measure = truth(table)
    sampler = GuidedSampler(table, seed=0)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    optuna.logging.set_verbosity(verbosity)
    for level in range(5):
        study.enqueue_trial(dict.fromkeys(table.names, level))
    for _ in range(15):
        trial = study.ask(sampler.distributions)
        levels = [trial.params[name] for name in table.names]
        damage = float(np.exp(measure(levels)))
        trial.set_user_attr("retained", float(np.exp(-damage)))
        study.tell(trial, [damage, table.total("storage_bytes", levels)])
    front = study.best_trials
    assert any(t.number >= 5 for t in front)
    proposals = {tuple(t.params.values()) for t in study.trials}
    assert len(proposals) == 15


def test_a_foreign_parameter_is_refused():
    sampler = GuidedSampler(a_table())
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    with pytest.raises(UsageError, match="asks for 'x'"):
        study.ask().suggest_float("x", 0, 1)
