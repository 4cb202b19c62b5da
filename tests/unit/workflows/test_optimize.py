"""What a search is told to optimize, on its way into settings, aims and the shortlist."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from autocompress.core import (
    LATENCY,
    STORAGE,
    Allocation,
    Measurement,
    Metrics,
    Objectives,
    Quality,
    Resource,
    Scheme,
    TrialRequest,
    TrialResult,
    TrialStatus,
)
from autocompress.core.errors import UsageError
from autocompress.workflows import publish
from autocompress.workflows.aims import parse_aims
from autocompress.workflows.publish import shortlist, thinned
from autocompress.workflows.settings import SearchSettings, require_same_study

BOTH = Objectives.parse("quality,bytes,latency")
LATENCY_FIRST = Objectives.parse("quality,latency,bytes")


def test_settings_of_a_version_that_did_not_ask_are_about_bytes():
    data = SearchSettings("model").to_json()
    assert data.pop("optimize") == "quality,bytes"
    assert SearchSettings.from_json(data) == SearchSettings("model")


def test_a_study_is_the_same_however_its_objectives_are_typed():
    old = SearchSettings("model", optimize="quality,bytes,latency")
    require_same_study(old, SearchSettings("model", optimize=" bytes, latency,quality"))
    with pytest.raises(UsageError, match=r"optimize \(was 'quality,bytes,latency'"):
        require_same_study(old, SearchSettings("model", optimize="quality,latency,bytes"))


def test_aims_are_values_of_the_main_resource():
    assert parse_aims(["60MB"], BOTH) == (60e6,)
    assert parse_aims(["3ms", "800 us", "0.01s"], LATENCY_FIRST) == pytest.approx((3.0, 0.8, 10.0))
    assert parse_aims([], Objectives.parse("quality,macs")) == ()


@pytest.mark.parametrize("text", ["60MB", "3", "0ms", "-1ms", "ms", "1.2.3ms", "nan ms"])
def test_an_aim_that_is_no_time_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match="Example: 3ms"):
        parse_aims([text], LATENCY_FIRST)


@pytest.mark.parametrize("text", ["3ms", "800 us", "0.01s"])
def test_a_time_where_bytes_come_first_is_refused_with_what_would_take_it(text):
    with pytest.raises(UsageError, match=r"is a size, but got .*--optimize quality,latency"):
        parse_aims([text], BOTH)


def trial(number, damage, size, time):
    quality = Quality(1.0 - damage, 0.0, Measurement(damage, 0.0), {}, 10)
    resources = {STORAGE: Resource(size, "bytes", "x"), LATENCY: Resource(time, "ms", "x")}
    allocation = Allocation.of(
        {
            "layer": Scheme.parse(f"rtn(bits={2 + number % 7})"),
            f"l{number}": Scheme.parse("rtn(bits=4)"),
        }
    )
    request = TrialRequest(number, allocation, "sampler:x")
    return TrialResult(request, TrialStatus.COMPLETE, Metrics(quality, resources))


def numbers(results):
    return sorted(r.request.number for r in results)


def test_the_shortlist_is_the_front_over_what_is_optimized():
    results = [trial(0, 0.2, 10, 9.0), trial(1, 0.1, 20, 9.0), trial(2, 0.2, 30, 1.0)]
    assert [r.number for r in shortlist(results)] == [0, 1]
    assert [r.number for r in shortlist(results, Objectives.parse("quality,latency"))] == [1, 2]
    assert [r.number for r in shortlist(results, BOTH)] == [0, 1, 2]


def test_the_member_goes_that_would_be_missed_least():
    damages, sizes = [0.8, 0.4, 0.39, 0.1, 0.01], [10, 20, 21, 40, 80]
    front = [trial(i, d, s, 1.0) for i, (d, s) in enumerate(zip(damages, sizes, strict=True))]
    assert numbers(thinned(front, 4)) == [0, 1, 3, 4]
    assert numbers(thinned(front, 1)) == [0, 4]


def test_what_baselines_are_compared_with_is_never_thinned_out(monkeypatch):
    """However crowded the front, the best trial that takes no more than a baseline is measured."""
    monkeypatch.setattr(publish, "MOST_MEMBERS", 5)
    front = [trial(i, 0.9**i, 10.0 + i, 1.0) for i in range(40)]
    others = [trial(40 + i, 0.9**k * 1.001, 10.0 + k + 0.5, 1.0) for i, k in enumerate((7, 22))]
    baselines = [replace(t, request=replace(t.request, source="baseline:u")) for t in others]
    kept = numbers_of(shortlist([*front, *baselines]))
    assert {7, 22, 40, 41} <= set(kept)
    assert len(kept) == 5 + len(baselines)
    assert len(thinned(front, 2, always=range(10))) == 11  # and the best of each objective


def numbers_of(requests):
    return [request.number for request in requests]


def test_of_a_front_over_three_objectives_the_best_of_each_stay():
    grid = itertools.product(range(1, 5), repeat=2)
    front = [trial(i, 0.9 ** (a + b), 10.0 * a, 1.0 * b) for i, (a, b) in enumerate(grid)]
    kept = thinned(front, 6, BOTH)
    assert len(kept) == 6
    for best in range(3):
        ends = [BOTH.losses(r.metrics)[best] for r in (*front, *kept)]
        assert min(ends[: len(front)]) == min(ends[len(front) :])
