"""Laws of fronts, with ties and NaN among the points; naive references beside the fast code."""

from __future__ import annotations

import itertools
import math
from operator import le

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autocompress.core import LATENCY, Objectives, Resource
from autocompress.fronts import (
    BaseEntry,
    BudgetSpent,
    Front,
    FrontDocument,
    Member,
    MemberQuality,
    StudySummary,
    Verdict,
    against_baselines,
    hypervolume,
    knee_index,
    non_dominated,
    paired,
    parse_bytes,
    unpaired,
)

# A busy machine is no reason to fail.
laws = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Few distinct values, so that ties and duplicates are the rule.
coordinates = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 2.0, 3.0, math.inf, math.nan])
one_to_four = st.integers(1, 4)
small = st.integers(0, 6).map(float)


def point_sets(values, dimensions=one_to_four, most=12):
    return dimensions.flatmap(
        lambda m: st.lists(st.tuples(*[values] * m), min_size=1, max_size=most)
    )


def naive_non_dominated(points):
    def dominates(a, b):
        return all(x <= y for x, y in zip(a, b, strict=True)) and any(
            x < y for x, y in zip(a, b, strict=True)
        )

    valid = [not any(map(math.isnan, p)) for p in points]
    return [
        ok and not any(v and dominates(q, p) for q, v in zip(points, valid, strict=True))
        for p, ok in zip(points, valid, strict=True)
    ]


def grid_hypervolume(points, reference):
    """Counts unit cells: exact for points and a reference with integer coordinates."""
    cells = itertools.product(*(range(int(r)) for r in reference))
    return sum(
        any(all(x <= c for x, c in zip(point, cell, strict=True)) for point in points)
        for cell in cells
    )


@laws
@given(point_sets(coordinates))
def test_the_front_is_what_the_definition_says(points):
    assert non_dominated(points).tolist() == naive_non_dominated(points)


@laws
@given(point_sets(coordinates), st.randoms(use_true_random=False))
def test_the_front_does_not_depend_on_the_order_of_the_points(points, random):
    order = list(range(len(points)))
    random.shuffle(order)
    mask = non_dominated(points)
    shuffled = non_dominated([points[i] for i in order])
    assert shuffled.tolist() == [bool(mask[i]) for i in order]


@laws
@given(point_sets(coordinates))
def test_ties_are_kept_or_left_out_together(points):
    mask = non_dominated([*points, *points])
    assert mask[: len(points)].tolist() == mask[len(points) :].tolist()


@laws
@given(point_sets(coordinates))
def test_a_nan_is_never_kept_and_dominates_nothing(points):
    dimensions = len(points[0])
    poisoned = [*points, (math.nan,) * dimensions, (-5.0,) * (dimensions - 1) + (math.nan,)]
    mask = non_dominated(poisoned)
    assert not mask[-2:].any()
    assert mask[:-2].tolist() == non_dominated(points).tolist()


@laws
@given(point_sets(coordinates))
def test_every_point_left_out_is_beaten_by_a_point_kept(points):
    array = np.array(points)
    mask = non_dominated(array)
    for point in array[~mask & ~np.isnan(array).any(axis=1)]:
        assert ((array[mask] <= point).all(axis=1) & (array[mask] < point).any(axis=1)).any()


@laws
@given(point_sets(small, st.integers(1, 3), most=6))
def test_the_hypervolume_is_the_number_of_unit_cells_covered(points):
    reference = (5.0,) * len(points[0])
    assert hypervolume(points, reference) == pytest.approx(grid_hypervolume(points, reference))


@laws
@given(point_sets(small, st.integers(2, 3)), st.data())
def test_another_point_never_shrinks_the_hypervolume(points, data):
    reference = (5.0,) * len(points[0])
    extra = data.draw(st.tuples(*[small] * len(points[0])))
    grown = hypervolume([*points, extra], reference)
    assert grown >= hypervolume(points, reference) - 1e-9


@laws
@given(point_sets(coordinates, st.integers(2, 3)))
def test_the_hypervolume_is_that_of_the_front_alone(points):
    reference = (2.5,) * len(points[0])
    front = Front.of(points, key=lambda p: p)
    assert hypervolume(points, reference) == pytest.approx(front.hypervolume(reference))


@laws
@given(point_sets(coordinates, st.integers(2, 3)), st.randoms(use_true_random=False))
def test_a_front_is_sorted_and_does_not_depend_on_the_order_of_candidates(points, random):
    shuffled = list(points)
    random.shuffle(shuffled)
    front = Front.of(points, key=lambda p: p)
    assert front.points == Front.of(shuffled, key=lambda p: p).points
    assert list(front.points) == sorted(front.points)
    assert len(front) == len(front.members) == int(non_dominated(points).sum())


fronts = st.lists(st.tuples(st.integers(1, 10**9), st.floats(0, 1.1)), min_size=1, max_size=12)


@laws
@given(fronts, st.randoms(use_true_random=False))
def test_the_knee_does_not_depend_on_the_order_of_the_points(points, random):
    shuffled = list(points)
    random.shuffle(shuffled)
    first = points[knee_index(*zip(*points, strict=True))]
    assert shuffled[knee_index(*zip(*shuffled, strict=True))] == first


@laws
@given(fronts, st.sampled_from([2.0, 1024.0, 0.125]))
def test_the_knee_does_not_depend_on_the_unit_of_size(points, factor):
    sizes, quality = zip(*points, strict=True)
    # Sizes that are exact powers keep the logarithm's rounding out of it.
    powers = [2.0 ** (size % 24) for size in sizes]
    scaled = [power * factor for power in powers]
    assert knee_index(scaled, quality) == knee_index(powers, quality)


@laws
@given(st.integers(1, 10**15))
def test_a_number_of_bytes_reads_as_itself(size):
    assert parse_bytes(size) == parse_bytes(str(size)) == parse_bytes(f" {size} B ") == size


@laws
@given(st.integers(1, 10**6), st.sampled_from(["kB", "MB", "GB", "TB"]))
def test_decimal_units_are_powers_of_1000_and_binary_ones_of_1024(number, unit):
    power = "kMGT".index(unit[0]) + 1
    assert parse_bytes(f"{number}{unit}") == number * 1000**power
    assert parse_bytes(f"{number} {unit[0].upper()}iB") == number * 1024**power


# Few values, so that ties in bytes and quality are common; names mark baselines.
entries = st.lists(
    st.tuples(
        st.integers(1, 5),
        st.integers(1, 4),
        st.sampled_from([0.1, 0.5, 0.51, 0.9, math.nan]),
        st.sampled_from([0.0, 0.01, 0.3, math.nan]),
        st.booleans(),
        st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.1]), min_size=4, max_size=4),
    ),
    max_size=9,
)


objectives = st.sampled_from(["quality,bytes", "quality,latency", "quality,bytes,latency"]).map(
    Objectives.parse
)


def made_up_front(drawn, over):
    """A document of drawn entries, and the damages of each entry's sequences."""
    everyone = [
        Member(
            id=f"{i}",
            bits_per_weight=4.0,
            storage_bytes=size,
            size_reduction=1.0,
            quality=MemberQuality(retained, error),
            resources={LATENCY: Resource(0.1 * time, "ms", "analytic")},
            cost_efficiency=math.nan,
            allocation={},
            name=f"baseline-{i}" if is_baseline else "",
        )
        for i, (size, time, retained, error, is_baseline, _) in enumerate(drawn)
    ]
    damages = {f"{i}": values[-1] for i, values in enumerate(drawn)}
    document = FrontDocument.of(
        StudySummary("", "", "", "", 0, BudgetSpent(0, 0.0, 0)),
        BaseEntry(5, MemberQuality(1.0, 0.0), {LATENCY: Resource(0.4, "ms", "analytic")}),
        [m for m in everyone if m.name],
        everyone,
        differences=paired(damages),
        objectives=over,
    )
    return document, damages


@laws
@given(entries, objectives)
def test_no_member_is_beaten_and_all_that_is_left_out_is(drawn, over):
    everyone, _ = made_up_front([(*entry[:4], True, entry[5]) for entry in drawn], over)
    points = {b.id: (*over.costs(b), -b.quality.retained) for b in everyone.baselines}
    kept = naive_non_dominated(list(points.values()))
    expected = {name for name, keep in zip(points, kept, strict=True) if keep}
    assert {m.id for m in everyone.members} == expected


@laws
@given(entries, objectives)
def test_a_front_of_candidates_that_hold_the_baselines_is_never_worse(drawn, over):
    document, _ = made_up_front(drawn, over)
    assert [c.baseline for c in document.comparisons] == [b.name for b in document.baselines]
    for compared, baseline in zip(document.comparisons, document.baselines, strict=True):
        known = math.isfinite(baseline.quality.retained)
        assert compared.verdict in ((Verdict.BETTER, Verdict.TIE) if known else (Verdict.NONE,))
        if known:
            assert all(compared.saving(name) >= 0 for name in over.resources)
            assert compared.member in {m.id for m in document.members}
            assert compared.is_itself == (compared.member == baseline.id)


@laws
@given(entries, objectives)
def test_only_a_front_without_the_baseline_can_lose_to_it(drawn, over):
    document, damages = made_up_front(drawn, over)
    for baseline in document.baselines:
        rest = [m for m in document.members if m.id != baseline.id]
        for differences in (unpaired, paired(damages)):
            (compared,) = against_baselines(rest, [baseline], differences, over)
            fitting = [m for m in rest if all(map(le, over.costs(m), over.costs(baseline)))]
            assert not compared.is_itself
            if compared.verdict is Verdict.WORSE:
                assert all(m.quality.retained < baseline.quality.retained for m in fitting)
            if not fitting:
                assert compared.verdict is Verdict.NONE
