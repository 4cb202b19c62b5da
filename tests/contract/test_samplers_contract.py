"""Every registered sampler, put through what the study relies on. A new one is met here unasked."""

import random
import warnings
from dataclasses import replace

import numpy as np
import pytest

from autocompress.core import (
    LATENCY,
    Objectives,
    Scheme,
    TrialRequest,
    TrialResult,
    TrialStatus,
)
from autocompress.core.errors import UsageError
from autocompress.search import SAMPLERS
from autocompress.search.study import baselines
from autocompress.spaces.space import Choice, Option, SearchSpace
from autocompress.testing.replay import ReplayDriver, ReplayTable, Response

SLOW = {"gp": 16}
"""Samplers of seconds per proposal, with the number of trials that the tests give them."""
NAMES = tuple(
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SAMPLERS
)
BITS = (2, 3, 4, 8)
WIDTHS = (64, 64, 32, 128, 64, 32)


def make_table(widths=WIDTHS, bits=BITS):
    """Damages that fall fourfold per bit, layers that weigh differently, neighbours that add up."""
    choices = tuple(
        Choice(
            f"layer{i}",
            (f"layer{i}",),
            tuple(Option(f"{b}", (Scheme.parse(f"rtn(bits={b})"),), width * b) for b in bits),
            width * 16,
        )
        for i, width in enumerate(widths)
    )
    space = SearchSpace("contract", "bits of some layers", choices)
    weights = np.random.default_rng(4).uniform(0.5, 3.0, len(widths))
    singles = (weights[:, None] * 0.25 ** np.array(bits, dtype=float)).ravel()
    n = len(bits)
    roots = np.sqrt(singles)
    near = np.abs(np.subtract.outer(np.arange(len(singles)) // n, np.arange(len(singles)) // n))
    pairs = 0.4 * np.outer(roots, roots) * (near == 1)
    return ReplayTable(
        space, singles, pairs, {}, fixed_bytes=1000, n_tokens=64, damage_name="kl_nats_per_token",
        response=Response(1.0, 1.0, 2.0),
    )  # fmt: skip


TABLE = make_table()


def sampler_of(name, table=TABLE, seed=1):
    return SAMPLERS[name](table.space, seed=seed, table=table.option_table())


def told(sampler, result):
    """As a study does: keep the sampler's state with the result, then tell."""
    result = replace(result, sampler_state=dict(sampler.state(result.request.number)))
    sampler.tell(result)
    return result


def started(name, table=TABLE, seed=1):
    sampler, driver = sampler_of(name, table, seed), ReplayDriver(table)
    requests = [
        TrialRequest(n, allocation, f"baseline:{baseline}")
        for n, (baseline, allocation) in enumerate(baselines(table.space))
    ]
    return sampler, [told(sampler, driver.answer(r)) for r in requests]


def go_on(sampler, results, until, table=TABLE, fail_every=0):
    driver = ReplayDriver(table)
    for number in range(len(results), min(until, SLOW.get(sampler.name, until))):
        result = driver.answer(TrialRequest(number, sampler.ask(number), f"sampler:{sampler.name}"))
        if fail_every and number % fail_every == 0:
            result = TrialResult(result.request, TrialStatus.FAILED, error="x")
        results.append(told(sampler, result))
    return results


def allocations(results):
    return [r.request.allocation for r in results]


@pytest.mark.parametrize("name", NAMES)
def test_proposals_lie_in_the_space_and_repeat_none(name):
    found = allocations(go_on(*started(name), 50))
    assert all(a in TABLE.space for a in found[1:])
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_studies_whatever_the_global_random_state(name):
    first = go_on(*started(name, seed=5), 30)
    random.seed(99)
    np.random.seed(99)
    state = np.random.get_state()[1].copy()
    assert go_on(*started(name, seed=5), 30) == first
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("killed_at", [2, 29])
@pytest.mark.parametrize("name", NAMES)
def test_a_sampler_that_is_told_a_journal_goes_on_as_the_one_that_wrote_it(name, killed_at):
    uninterrupted = go_on(*started(name), 36, fail_every=9)
    journal = [TrialResult.from_json(r.to_json()) for r in uninterrupted[:killed_at]]
    resumed, rest = sampler_of(name), started(name)[1][killed_at:]
    for result in journal:
        resumed.tell(result)
    journal += [told(resumed, result) for result in rest]
    assert go_on(resumed, journal, 36, fail_every=9) == uninterrupted


@pytest.mark.parametrize("name", NAMES)
def test_several_asks_before_a_tell_give_different_proposals(name):
    sampler, results = started(name)
    first = len(go_on(sampler, results, 26))
    asked = [sampler.ask(n) for n in range(first, first + 6)]
    assert len({*asked, *allocations(results)}) == len(asked) + len(results)
    driver = ReplayDriver(TABLE)
    for number, allocation in reversed(list(enumerate(asked, start=first))):
        told(sampler, driver.answer(TrialRequest(number, allocation, "s")))
    assert sampler.ask(first + 6) not in asked


@pytest.mark.parametrize("name", NAMES)
def test_the_end_of_a_small_space_is_no_error(name):
    table = make_table(widths=(64, 32), bits=(2, 3, 8))
    found = allocations(go_on(*started(name, table), table.space.n_combinations + 6, table))
    assert all(a in table.space for a in found[1:])
    assert len(set(found)) >= min(table.space.n_combinations, len(found)) - 1


@pytest.mark.parametrize("name", NAMES)
def test_a_space_without_any_freedom_has_one_answer(name):
    table = make_table(widths=(64, 32), bits=(4,))
    sampler = sampler_of(name, table)
    assert sampler.ask(0) == table.space.decode({"layer0": 0, "layer1": 0})


TIMED = replace(
    TABLE,
    # Bound by arithmetic up to 3 bits: these options differ in bytes and damage alone.
    costs={LATENCY: np.array([0.1 * w * max(3, b) for w in WIDTHS for b in BITS])},
)


def over(name, optimize, seed=1):
    objectives = Objectives.parse(optimize)
    table = TIMED.option_table()
    return SAMPLERS[name](TABLE.space, seed=seed, table=table, objectives=objectives)


@pytest.mark.parametrize("name", NAMES)
def test_any_resource_can_be_what_quality_is_traded_for(name):
    found = go_on(over(name, "quality,latency"), [], 10, TIMED)
    assert len(set(allocations(found))) == len(found)
    times = {r.metrics.resources[LATENCY].value for r in found}
    assert len(times) > 4  # it does not stay at one of them


@pytest.mark.parametrize("name", NAMES)
def test_several_resources_are_searched_or_refused_by_name(name):
    if SAMPLERS[name].has_one_budget:
        with pytest.raises(UsageError, match=f"{name!r} has a budget of one resource.*nsga2"):
            over(name, "quality,bytes,latency")
        return
    found = allocations(go_on(over(name, "quality,bytes,latency"), [], 10, TIMED))
    assert all(a in TABLE.space for a in found)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_warned_about(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go_on(*started(name), 20)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_named_and_summarised_in_one_line(name):
    sampler = SAMPLERS[name]
    assert sampler.name == name
    assert 0 < len(sampler.summary) <= 90
    assert "\n" not in sampler.summary


@pytest.mark.parametrize("name", [n for n in SAMPLERS if SAMPLERS[n].needs_table])
def test_what_needs_predicted_damages_says_so(name):
    with pytest.raises(UsageError, match="table"):
        SAMPLERS[name](TABLE.space, seed=0)
