import itertools
import random
import warnings

import pytest

from autocompress.core import (
    BASE_ALLOCATION,
    Measurement,
    Metrics,
    Quality,
    Resource,
    Scheme,
    TrialRequest,
    TrialResult,
    TrialStatus,
)
from autocompress.core.errors import UnknownNameError
from autocompress.search.samplers import SAMPLERS, Nsga2, RandomSearch
from autocompress.search.study import baselines
from autocompress.spaces.space import Choice, Option, SearchSpace

NAMES = ("random", "tpe", "nsga2")


def make_space(n_choices=6, n_levels=5):
    schemes = [Scheme.parse(f"rtn(bits={b})") for b in range(2, 1 + n_levels)] + [Scheme()]
    choices = tuple(
        Choice(f"layer{i}", (f"layer{i}",), tuple(Option(str(s), (s,), 0) for s in schemes))
        for i in range(n_choices)
    )
    return SearchSpace("test", "bits of some layers", choices)


SPACE = make_space()


def measured(request, space=SPACE, status=TrialStatus.COMPLETE):
    """A made-up front: fewer bits, more damage, each layer weighing differently."""
    if status is not TrialStatus.COMPLETE:
        return TrialResult(request, status, error="x")
    if request.allocation in space:
        levels = list(space.encode(request.allocation).values())
    else:
        levels = [0] * len(space.choices)
    damage = sum((4 - v) ** 2 * (i + 1) for i, v in enumerate(levels)) / 100
    quality = Quality(1 - damage, 0.0, Measurement(damage, 0.0), {}, 10)
    size = Resource(float(sum(levels) + 1), "bytes", "analytic")
    return TrialResult(request, status, Metrics(quality, {"storage_bytes": size}), 0.1, 10)


def baseline_results(space):
    return [
        measured(TrialRequest(n, allocation, f"baseline:{name}"), space)
        for n, (name, allocation) in enumerate(baselines(space))
    ]


def told(sampler, result):
    """As a study does: keep the sampler's state with the result, then tell."""
    from dataclasses import replace

    result = replace(result, sampler_state=dict(sampler.state(result.request.number)))
    sampler.tell(result)
    return result


def go_on(sampler, results, until, fail_every=0):
    for number in range(len(results), until):
        request = TrialRequest(number, sampler.ask(number), f"sampler:{sampler.name}")
        fails = fail_every and number % fail_every == 0
        status = TrialStatus.FAILED if fails else TrialStatus.COMPLETE
        results.append(told(sampler, measured(request, sampler.space, status)))
    return results


def started(name, space=SPACE, seed=1):
    sampler = SAMPLERS[name](space, seed=seed)
    return sampler, [told(sampler, r) for r in baseline_results(space)]


@pytest.mark.parametrize("name", NAMES)
def test_proposals_lie_in_the_space_and_repeat_none(name):
    sampler, results = started(name)
    results = go_on(sampler, results, 80)
    allocations = [r.request.allocation for r in results]
    assert all(a in SPACE for a in allocations)
    assert len(set(allocations)) == len(allocations)


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_studies_and_others_do_not(name):
    first = go_on(*started(name, seed=5), 50)
    assert go_on(*started(name, seed=5), 50) == first
    assert go_on(*started(name, seed=6), 50) != first


@pytest.mark.parametrize("name", NAMES)
def test_global_random_state_is_neither_used_nor_changed(name):
    import numpy as np

    first = go_on(*started(name), 40)
    random.seed(99)
    np.random.seed(99)
    state = np.random.get_state()[1].copy()
    assert go_on(*started(name), 40) == first
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("killed_at", [3, 12, 23, 24, 25, 47])
@pytest.mark.parametrize("name", NAMES)
def test_a_sampler_that_is_told_a_journal_goes_on_as_the_one_that_wrote_it(name, killed_at):
    uninterrupted = go_on(*started(name), 70, fail_every=9)
    journal = [TrialResult.from_json(r.to_json()) for r in uninterrupted[:killed_at]]
    resumed = SAMPLERS[name](SPACE, seed=1)
    for result in journal:
        resumed.tell(result)
    if killed_at < len(baseline_results(SPACE)):
        journal += [told(resumed, r) for r in baseline_results(SPACE)[killed_at:]]
    assert go_on(resumed, journal, 70, fail_every=9) == uninterrupted


def test_random_proposals_do_not_depend_on_what_was_told_or_when():
    eager, results = started("random")
    eager_allocations = [r.request.allocation for r in go_on(eager, results, 40)]
    late, results = started("random")
    asked = [late.ask(n) for n in range(len(results), 40)]
    assert asked == eager_allocations[len(results) :]


def test_a_gap_in_the_journal_is_filled_with_the_same_random_proposal():
    results = go_on(*started("random"), 30)
    resumed = SAMPLERS["random"](SPACE, seed=1)
    for result in results[:15] + results[17:]:
        resumed.tell(result)
    assert [resumed.ask(n) for n in (15, 16)] == [r.request.allocation for r in results[15:17]]


def test_a_small_space_is_searched_to_its_last_member_before_anything_repeats():
    space = make_space(n_choices=2, n_levels=3)
    sampler, results = started("random", space)
    seen = {r.request.allocation for r in go_on(sampler, results, space.n_combinations)}
    assert len(seen) >= space.n_combinations - 1
    assert sampler.ask(1000) in space


@pytest.mark.parametrize("name", NAMES)
def test_a_space_without_any_freedom_has_one_answer(name):
    space = make_space(n_choices=2, n_levels=1)
    assert SAMPLERS[name](space, seed=0).ask(0) == BASE_ALLOCATION


def test_the_baselines_are_parents_of_nsga2():
    space = make_space(n_choices=30, n_levels=5)
    sampler, results = started("nsga2", space)
    n_baselines = len(results)
    results = go_on(sampler, results, 17)
    generations = [next(iter(r.sampler_state.values())) for r in results]
    assert generations == [0] * Nsga2.population_size + [1]
    uniform = {
        frozenset(space.encode(r.request.allocation).values()) for r in results[:n_baselines]
    }
    assert uniform == {frozenset({v}) for v in range(5)}
    # Parents compete by rank: the baselines span this made-up front, random members seldom do.
    study = sampler.study
    parents = study.sampler._owner.make_sampler(0).get_parent_population(study, 1)
    assert {t.number for t in parents} >= set(range(n_baselines))


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_adaptive_samplers_beat_random_on_a_smooth_problem(name):
    from autocompress.core import DEFAULT_OBJECTIVES
    from autocompress.fronts import hypervolume

    space = make_space(n_choices=8)

    def volume(which, seed):
        results = go_on(*started(which, space, seed), 100)
        return hypervolume([DEFAULT_OBJECTIVES.losses(r.metrics) for r in results], (6.0, 34.0))

    pairs = [(volume(name, s), volume("random", s)) for s in range(2)]
    assert sum(ours for ours, _ in pairs) > sum(theirs for _, theirs in pairs)


def test_the_base_model_outside_the_space_teaches_the_sampler_nothing():
    choice = Choice(
        "a", ("a",), tuple(Option(f"{b}", (Scheme.parse(f"rtn(bits={b})"),)) for b in (2, 3))
    )
    space = SearchSpace("no base", "without the base scheme", (choice,))
    sampler = RandomSearch(space, seed=0)
    sampler.tell(measured(TrialRequest(0, BASE_ALLOCATION, "baseline:base"), space))
    assert sampler.study.get_trials() == []


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_constraints_reach_the_study(name):
    sampler = SAMPLERS[name](
        SPACE, seed=0, constraints=lambda r: {"bytes": r.metrics.storage_bytes - 12.0}
    )
    results = [told(sampler, r) for r in baseline_results(SPACE)]
    go_on(sampler, results, 40)
    assert all(t.values[1] <= 12.0 for t in sampler.study.best_trials)
    assert any(t.values[1] > 12.0 for t in sampler.study.trials)


@pytest.mark.parametrize("name", NAMES)
def test_several_asks_before_a_tell_give_different_proposals(name):
    sampler, results = started(name)
    go_on(sampler, results, 30)
    asked = [sampler.ask(n) for n in range(30, 38)]
    assert len(set(asked)) == 8
    for number, allocation in reversed(list(zip(itertools.count(30), asked, strict=False))):
        told(sampler, measured(TrialRequest(number, allocation, "s")))
    assert sampler.ask(38) not in asked


def test_the_registry_names_every_sampler_with_a_summary():
    assert set(SAMPLERS) > set(NAMES)
    assert all(SAMPLERS[name].summary and SAMPLERS[name].name == name for name in SAMPLERS)
    assert [SAMPLERS[name].adaptive for name in NAMES] == [False, True, True]
    with pytest.raises(UnknownNameError, match="Did you mean 'nsga2'"):
        SAMPLERS["nsga3"]


def test_nothing_experimental_is_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in NAMES:
            go_on(*started(name), 30)
