"""Fronts over other resources than bytes, and over several at once."""

from __future__ import annotations

import json

import pytest
from front_examples import BASE_BYTES, make_member, make_study

from autocompress.core import Objectives, Resource
from autocompress.core.errors import RunDirectoryError
from autocompress.fronts import BaseEntry, FrontDocument, MemberQuality, knee_index, pick

LATENCY = Objectives.parse("quality,latency")
BOTH = Objectives.parse("quality,bytes,latency")
BASE = BaseEntry(
    BASE_BYTES,
    MemberQuality(1.0, 0.0),
    {"latency_ms_per_token": Resource(2.0, "ms", "analytic")},
)
SMALL_SLOW = make_member("small", 20, 0.8, latency=1.6)
LARGE_FAST = make_member("large", 60, 0.8, latency=0.4)
MIDDLE = make_member("middle", 40, 0.9, latency=1.0)
BEATEN = make_member("beaten", 50, 0.85, latency=1.2)
UNIFORM = make_member("uniform", 45, 0.88, latency=1.1, is_baseline=True)


def front_of(objectives, *members, baselines=()):
    return FrontDocument.of(make_study(), BASE, baselines, members, objectives=objectives)


def names(document):
    return [m.id.rstrip("0") for m in document.members]


def test_the_front_is_over_what_was_optimized():
    members = (SMALL_SLOW, LARGE_FAST, MIDDLE, BEATEN)
    assert names(front_of(Objectives(), *members)) == ["small", "middle"]
    assert names(front_of(LATENCY, *members)) == ["large", "middle"]
    assert names(front_of(BOTH, *members)) == ["small", "middle", "large"]


def test_a_member_without_the_resource_is_left_out():
    unknown = make_member("unknown", 1, 1.0, latency=float("nan"))
    assert names(front_of(LATENCY, unknown, MIDDLE)) == ["middle"]
    assert names(front_of(Objectives(), unknown, MIDDLE)) == ["unknown"]


def test_the_hypervolume_of_three_objectives_is_a_volume():
    document = front_of(BOTH, SMALL_SLOW, LARGE_FAST)
    # each takes 1 - loss 0.2 over its part of the plane; both share that of the dearest corner
    small, large, shared = 0.8 * 0.2, 0.4 * 0.8, 0.4 * 0.2
    assert document.hypervolume == pytest.approx(0.8 * (small + large - shared))
    assert document.reference_point.coordinates == (1.0, 1.0, 1.0)
    assert front_of(LATENCY, LARGE_FAST).hypervolume == pytest.approx(0.8 * 0.8)


def test_a_baseline_meets_members_that_take_no_more_of_anything():
    for objectives, rival in ((Objectives(), "middle"), (LATENCY, "middle"), (BOTH, "middle")):
        document = front_of(objectives, SMALL_SLOW, LARGE_FAST, MIDDLE, baselines=[UNIFORM])
        (compared,) = document.comparisons
        assert compared.member.startswith(rival)
        assert [compared.saving(name) > 0 for name in objectives.resources] == (
            [True] * len(objectives.resources)
        )
    slower = make_member("slower", 44, 0.99, latency=1.5)
    (compared,) = front_of(BOTH, slower, MIDDLE, baselines=[UNIFORM]).comparisons
    assert compared.member.startswith("middle")
    (compared,) = front_of(Objectives(), slower, MIDDLE, baselines=[UNIFORM]).comparisons
    assert compared.member.startswith("slower")


def test_a_document_over_several_resources_reads_back(tmp_path):
    document = front_of(BOTH, SMALL_SLOW, LARGE_FAST, MIDDLE, baselines=[UNIFORM])
    assert FrontDocument.read(document.write(tmp_path)) == document
    assert json.loads((tmp_path / "front.json").read_text())["optimize"] == "quality,bytes,latency"


def test_a_file_that_does_not_say_is_over_quality_and_bytes(tmp_path):
    document = front_of(Objectives(), SMALL_SLOW, MIDDLE)
    data = document.to_json()
    del data["optimize"]
    (tmp_path / "front.json").write_text(json.dumps(data))
    assert FrontDocument.read(tmp_path) == document


def test_a_file_that_names_something_else_is_refused(tmp_path):
    data = front_of(LATENCY, MIDDLE).to_json() | {"optimize": "quality,beauty"}
    (tmp_path / "front.json").write_text(json.dumps(data))
    with pytest.raises(RunDirectoryError, match="at optimize"):
        FrontDocument.read(tmp_path)


def test_the_knee_is_where_quality_stops_paying_for_the_mean_of_the_costs():
    sizes, times, quality = [1, 2, 4, 8], [8, 1, 2, 4], [0.0, 0.8, 0.9, 1.0]
    assert knee_index(sizes, quality) == 1
    assert knee_index(sizes, quality, times) == 1
    assert knee_index(sizes, quality, [1, 8, 2, 4]) == 2  # the second is small, but slow
    assert knee_index(sizes, quality, [3, 3, 3, 3]) == knee_index(sizes, quality)


def test_a_pick_by_knee_is_over_what_was_optimized():
    slow_bend = make_member("bend", 25, 0.97, latency=6.0)
    members = (SMALL_SLOW, LARGE_FAST, MIDDLE, slow_bend, make_member("best", 90, 1.0, latency=6.0))
    by_bytes, by_time = (pick(front_of(o, *members), by="knee") for o in (Objectives(), LATENCY))
    assert by_bytes.id.startswith("bend")
    assert by_time.id.startswith("middle")
