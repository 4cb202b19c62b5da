from __future__ import annotations

import dataclasses
import json
import math

import pytest

from autocompress.core import Resource
from autocompress.core.errors import UsageError
from autocompress.objectives import (
    COST_EFFICIENCY_VERSION,
    CostEfficiency,
    Exponents,
    ProduceCost,
    cost_efficiency,
    default_weights,
    relative_resources,
)

ROOFLINE = "analytic (roofline of cpu-2core)"


def costs(latency=2.0, memory=100e6, storage=100e6, origin=ROOFLINE):
    return {
        "latency_ms_per_token": Resource(latency, "ms", origin),
        "peak_memory_bytes": Resource(memory, "bytes", "analytic"),
        "storage_bytes": Resource(storage, "bytes", "analytic"),
    }


BASE = costs()


def test_a_broken_small_model_loses_to_a_good_one_by_default():
    good, broken = (0.97, 1.0, 4.0), (0.55, 1.0, 8.0)
    assert cost_efficiency(*good) > 2 * cost_efficiency(*broken)
    raw = Exponents(1.0, 1.0, 1.0)
    assert cost_efficiency(*good, exponents=raw) < cost_efficiency(*broken, exponents=raw)
    assert CostEfficiency().is_feasible(0.97)
    assert not CostEfficiency().is_feasible(0.55)


def test_a_broken_small_model_loses_even_if_its_costs_shrink_with_its_size():
    assert cost_efficiency(0.97, 1 / 4, 4.0) > cost_efficiency(0.55, 1 / 8, 8.0)


def test_the_score_of_an_example_worked_by_hand():
    assert cost_efficiency(performance=0.98, resources=0.6, size_reduction=3.9) == pytest.approx(
        0.98**3 / 0.6 * 3.9
    )
    halves = Exponents(performance=2.0, resources=0.5, size_reduction=0.0)
    assert cost_efficiency(0.9, 0.25, 100.0, exponents=halves) == pytest.approx(0.81 / 0.5)


@pytest.mark.parametrize("performance", [0.0, -0.3, -1e9])
def test_a_model_at_or_below_chance_scores_zero(performance):
    assert cost_efficiency(performance, 0.1, 100.0) == 0.0


def test_a_performance_that_does_not_count_may_be_zero():
    assert cost_efficiency(0.0, 0.5, 2.0, exponents=Exponents(performance=0.0)) == 4.0


def test_extreme_arguments_overflow_to_infinity_not_to_an_error():
    assert cost_efficiency(1.0, 5e-324, 1e300) == math.inf
    assert cost_efficiency(5e-324, 1e300, 5e-324) == 0.0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf])
@pytest.mark.parametrize("name", ["resources", "size_reduction"])
def test_costs_and_sizes_must_be_positive(name, bad):
    arguments = {"performance": 1.0, "resources": 1.0, "size_reduction": 1.0, name: bad}
    with pytest.raises(UsageError, match=f"needs {name} to be finite and above 0"):
        cost_efficiency(**arguments)


def test_an_infinite_performance_is_refused():
    with pytest.raises(UsageError, match="Performance is finite"):
        cost_efficiency(math.inf, 1.0, 1.0)


def test_nan_wins_over_every_other_complaint():
    assert math.isnan(cost_efficiency(math.nan, -1.0, 1.0))
    assert math.isnan(cost_efficiency(1.0, math.nan, 0.0))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_exponents_must_keep_the_score_monotone(bad):
    with pytest.raises(UsageError, match="resources is"):
        Exponents(resources=bad)


def test_file_size_is_no_resource_by_default():
    assert set(default_weights()) == {"latency_ms_per_token", "peak_memory_bytes"}
    assert relative_resources(costs(storage=1.0), BASE) == 1.0


def test_relative_resources_are_a_weighted_geometric_mean():
    ours = costs(latency=1.0, memory=25e6)
    assert relative_resources(ours, BASE) == pytest.approx(math.sqrt(0.5 * 0.25))
    weights = {"latency_ms_per_token": 3.0, "peak_memory_bytes": 1.0}
    assert relative_resources(ours, BASE, weights) == pytest.approx((0.5**3 * 0.25) ** 0.25)
    assert relative_resources(ours, BASE, {"storage_bytes": 1.0}) == 1.0


def test_a_resource_without_weight_need_not_be_measured():
    only_latency = {"latency_ms_per_token": Resource(1.0, "ms", ROOFLINE)}
    weights = {"latency_ms_per_token": 1.0, "peak_memory_bytes": 0.0}
    assert relative_resources(only_latency, BASE, weights) == pytest.approx(0.5)


def test_a_resource_that_is_missing_is_named_with_the_nearest():
    with pytest.raises(UsageError, match=r"'latency_ms'.*Did you mean 'latency_ms_per_token'"):
        relative_resources(costs(), BASE, {"latency_ms": 1.0})


@pytest.mark.parametrize(
    "weights", [{}, {"peak_memory_bytes": 0.0}, {"peak_memory_bytes": -1.0, "storage_bytes": 2.0}]
)
def test_weights_must_weigh_something(weights):
    with pytest.raises(UsageError, match="at least 0 and not all 0"):
        relative_resources(costs(), BASE, weights)


def test_an_analytic_latency_is_never_compared_with_a_measured_one():
    with pytest.raises(UsageError, match="Only like compares with like"):
        relative_resources(costs(origin="measured on this machine"), BASE)


def test_units_must_agree():
    seconds = {**costs(), "latency_ms_per_token": Resource(0.002, "s", ROOFLINE)}
    with pytest.raises(UsageError, match=r"is in s .* in ms"):
        relative_resources(seconds, BASE)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf])
def test_a_cost_of_nothing_is_refused(value):
    with pytest.raises(UsageError, match="latency_ms_per_token to be finite and above 0"):
        relative_resources(costs(latency=value), BASE)
    with pytest.raises(UsageError, match="latency_ms_per_token of the base to be finite"):
        relative_resources(costs(), costs(latency=value))


def test_a_definition_scores_a_model_from_its_resources():
    ours = costs(latency=1.0, memory=50e6, storage=25e6)
    assert CostEfficiency().score(0.98, ours, BASE) == pytest.approx(0.98**3 / 0.5 * 4.0)
    assert CostEfficiency().score(1.0, BASE, BASE) == 1.0
    assert math.isnan(CostEfficiency().score(math.nan, ours, BASE))
    assert math.isnan(CostEfficiency().score(0.98, costs(latency=math.nan), BASE))


def test_a_floor_belongs_to_the_definition():
    strict = CostEfficiency(min_retained=0.97)
    assert strict.is_feasible(0.97)
    assert not strict.is_feasible(0.9699)
    assert not strict.is_feasible(math.nan)


def test_a_floor_in_percent_is_answered_with_the_share():
    with pytest.raises(UsageError, match=r"got min_retained 90\. Did you mean 0\.9\?"):
        CostEfficiency(min_retained=90)


def test_the_cost_to_produce_is_spread_over_the_tokens_served():
    produce = ProduceCost(seconds=1000.0, served_tokens=1e6)
    assert produce.ms_per_token == 1.0
    paid = produce.added_to(costs(latency=1.0))
    assert paid["latency_ms_per_token"].value == 2.0
    assert (
        paid["latency_ms_per_token"].origin == f"{ROOFLINE} + 1000 s to produce over 1e+06 tokens"
    )
    definition = CostEfficiency(weights={"latency_ms_per_token": 1.0})
    assert definition.score(1.0, costs(latency=1.0), BASE) == pytest.approx(2.0)
    assert definition.score(1.0, costs(latency=1.0), BASE, produce=produce) == pytest.approx(1.0)


def test_a_free_model_scores_as_if_nobody_asked():
    free = ProduceCost(0.0, 1.0)
    ours = costs(latency=1.5)
    assert CostEfficiency().score(0.9, ours, BASE, produce=free) == pytest.approx(
        CostEfficiency().score(0.9, ours, BASE)
    )


@pytest.mark.parametrize(("seconds", "tokens"), [(-1, 1), (math.inf, 1), (1, 0), (1, math.nan)])
def test_a_cost_to_produce_needs_time_and_tokens(seconds, tokens):
    with pytest.raises(UsageError, match="served tokens above 0"):
        ProduceCost(seconds, tokens)


def test_a_cost_to_produce_needs_a_latency_to_add_to():
    with pytest.raises(UsageError, match="latency_ms_per_token"):
        ProduceCost(1, 1).added_to({})


def test_a_definition_reads_back_from_its_json():
    definition = CostEfficiency(Exponents(2.0, 0.5, 1.0), {"peak_memory_bytes": 1.0}, 0.95)
    assert CostEfficiency.from_json(json.loads(json.dumps(definition.to_json()))) == definition
    assert definition.to_json()["version"] == COST_EFFICIENCY_VERSION


def test_a_definition_of_another_version_is_refused():
    with pytest.raises(UsageError, match="Scores of two versions do not compare"):
        CostEfficiency(version=COST_EFFICIENCY_VERSION + 1)


def test_a_definition_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CostEfficiency().min_retained = 0.0
