"""Laws of cost efficiency."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autocompress.core import Resource
from autocompress.objectives import (
    Candidate,
    CostEfficiency,
    Exponents,
    cost_efficiency,
    judge,
    relative_resources,
)

# A busy machine is no reason to fail.
laws = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

positive = st.floats(1e-4, 1e4)
quality = st.floats(-1.0, 1.5)
exponents = st.builds(Exponents, *[st.floats(0, 5)] * 3)
strict = st.builds(Exponents, *[st.floats(0.25, 5)] * 3)
growth = st.floats(1.001, 10)


@laws
@given(exponents)
def test_the_base_model_scores_exactly_one(chosen):
    assert cost_efficiency(1.0, 1.0, 1.0, exponents=chosen) == 1.0


@laws
@given(st.floats(1e-3, 1.5), positive, positive, strict, growth)
def test_better_in_any_argument_scores_higher(performance, resources, size, chosen, factor):
    score = cost_efficiency(performance, resources, size, exponents=chosen)
    assert cost_efficiency(performance * factor, resources, size, exponents=chosen) > score
    assert cost_efficiency(performance, resources * factor, size, exponents=chosen) < score
    assert cost_efficiency(performance, resources, size * factor, exponents=chosen) > score


@laws
@given(quality, quality, positive, positive, exponents)
def test_more_quality_never_scores_lower(a, b, resources, size, chosen):
    low, high = sorted((a, b))
    first = cost_efficiency(low, resources, size, exponents=chosen)
    assert first <= cost_efficiency(high, resources, size, exponents=chosen)


@laws
@given(quality, positive, positive, exponents, st.sets(st.integers(0, 2), min_size=1))
def test_nan_in_gives_nan_out(performance, resources, size, chosen, poisoned):
    arguments = [performance, resources, size]
    for i in poisoned:
        arguments[i] = math.nan
    assert math.isnan(cost_efficiency(*arguments, exponents=chosen))


@laws
@given(st.floats(1e-3, 1.5), positive, positive)
def test_the_default_is_the_formula_of_the_documentation(performance, resources, size):
    expected = performance**3 / resources * size
    assert cost_efficiency(performance, resources, size) == pytest.approx(expected)


def costs(latency, memory, storage=1.0, unit=1.0):
    return {
        "latency_ms_per_token": Resource(latency * unit, "ms", "analytic"),
        "peak_memory_bytes": Resource(memory * unit, "bytes", "analytic"),
        "storage_bytes": Resource(storage * unit, "bytes", "analytic"),
    }


@laws
@given(positive, positive, positive, positive, st.floats(1e-3, 1e3))
def test_relative_resources_have_no_unit(a, b, c, d, unit):
    plain = relative_resources(costs(a, b), costs(c, d))
    scaled = relative_resources(costs(a, b, unit=unit), costs(c, d, unit=unit))
    assert scaled == pytest.approx(plain)
    assert plain == pytest.approx(math.sqrt(a / c * b / d))


@laws
@given(positive, positive, st.floats(0.1, 9), st.floats(0.1, 9), st.floats(0.1, 9))
def test_only_the_ratio_of_the_weights_counts(a, b, first, second, factor):
    def mean(scale):
        weights = {"latency_ms_per_token": first * scale, "peak_memory_bytes": second * scale}
        return relative_resources(costs(a, b), costs(1.0, 1.0), weights)

    assert mean(1.0) == pytest.approx(mean(factor))


@laws
@given(st.builds(CostEfficiency, exponents), positive, positive, positive)
def test_the_base_scores_one_under_every_definition(definition, latency, memory, storage):
    base = costs(latency, memory, storage)
    assert definition.score(1.0, base, base) == 1.0


@laws
@given(
    st.floats(0, 2), st.integers(1, 10**9), st.floats(0, 9), st.floats(0, 9),
    st.floats(0, 2), st.integers(1, 10**9), st.floats(0, 9), st.floats(0, 9),
)  # fmt: skip
def test_a_gate_compares_each_value_with_its_own_threshold(
    retained, size, efficiency, latency, least, most, least_efficiency, most_latency
):
    checks = judge(
        Candidate("x", retained, 0.0, size, efficiency, latency),
        min_quality=least,
        max_bytes=most,
        min_cost_efficiency=least_efficiency,
        max_latency_ms=most_latency,
    )
    assert [check.passed for check in checks] == [
        retained >= least, size <= most, efficiency >= least_efficiency, latency <= most_latency,
    ]  # fmt: skip
