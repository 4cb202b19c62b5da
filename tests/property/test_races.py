"""Racing loses hardly any good candidate, whatever the noise looks like."""

from operator import le

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.core import (
    Allocation,
    Bar,
    Measurement,
    Metrics,
    Quality,
    Resource,
    TrialRequest,
    TrialResult,
    TrialStatus,
)
from autocompress.search.racing import Racing, Rivals

RACING = Racing()
N_TRIALS = 3000
amounts = st.integers(0, 20)
n_resources = st.shared(st.integers(1, 3), key="resources")
costs = n_resources.flatmap(lambda n: st.tuples(*[amounts] * n))
points = st.lists(st.tuples(costs, amounts), max_size=30)


def result_of(number, damage):
    quality = Quality(1.0, 0.0, Measurement(float(damage), 0.0), {}, 1)
    metrics = Metrics(quality, {"storage_bytes": Resource(1.0, "bytes", "analytic")})
    request = TrialRequest(number, Allocation(), "test")
    return TrialResult(request, TrialStatus.COMPLETE, metrics, damages=(float(damage),))


@given(points=points, limits=costs)
def test_the_rival_is_found_as_by_looking_at_all_trials(points, limits):
    rivals = Rivals()
    for number, (taken, damage) in enumerate(points):
        rivals.add(taken, result_of(number, damage))
    fitting = [damage for taken, damage in points if all(map(le, taken, limits))]
    bar = rivals.bar(limits)
    assert (bar.damages[0] if bar else None) == (min(fitting) if fitting else None)


@given(
    n=st.integers(1, 200),
    shares=st.lists(st.floats(0.01, 0.99), unique=True, max_size=4).map(sorted),
    least=st.integers(1, 9),
)
def test_rungs_cover_all_sequences_and_none_is_short(n, shares, least):
    ends = Racing(tuple(shares), min_sequences=least).ends(n)
    steps = np.diff((0, *ends))
    assert ends[-1] == n
    assert len(ends) == 1 or steps.min() >= least


def noise(kind, draw, shape):
    """Multiplicative, mean 1: what a sequence adds to a candidate's damage of its own."""
    if kind == "normal":
        return 1 + 0.2 * draw.standard_normal(shape)
    if kind == "log-normal":
        return np.exp(0.5 * draw.standard_normal(shape) - 0.125)
    return 0.7 + draw.exponential(0.3, shape)


def lost(kind, advantage, n, seed):
    """Share of candidates, better than their rival by `advantage`, that are stopped."""
    draw = np.random.default_rng(seed)
    difficulty = draw.lognormal(0.0, 0.7, (N_TRIALS, n))  # common to candidate and rival
    candidate = difficulty * noise(kind, draw, (N_TRIALS, n)) * (1 - advantage)
    rival = difficulty * noise(kind, draw, (N_TRIALS, n))
    ends = RACING.ends(n)[:-1]
    stopped = [
        any(RACING.is_beaten(c[:end], Bar(0, tuple(r))) for end in ends)
        for c, r in zip(candidate, rival, strict=True)
    ]
    return np.mean(stopped)


@pytest.mark.parametrize("kind", ["normal", "log-normal", "exponential"])
@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize("advantage", [0.0, 0.1])
def test_a_front_member_is_hardly_ever_lost(kind, n, advantage):
    bound = (len(RACING.ends(n)) - 1) * (1 - RACING.confidence)
    tolerance = 3 * np.sqrt(bound / N_TRIALS)  # of 3,000 draws
    assert lost(kind, advantage, n, seed=1) <= bound + tolerance


@pytest.mark.parametrize("kind", ["normal", "log-normal", "exponential"])
def test_a_candidate_of_twice_the_damage_is_mostly_stopped(kind):
    assert lost(kind, -1.0, 16, seed=2) > 0.08
    assert lost(kind, -1.0, 64, seed=2) > 0.85
