"""What a study optimizes: read, written, and turned into losses."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from autocompress.core import LATENCY, STORAGE, Measurement, Metrics, Objectives, Quality, Resource
from autocompress.core.errors import UsageError
from autocompress.core.objectives import RESOURCE_NAMES, comparable, cost_of


def metrics(retained=0.97, damage=0.03, storage=25e6, latency=1.0):
    resources = {STORAGE: Resource(storage, "bytes", "analytic")}
    if latency is not None:
        resources[LATENCY] = Resource(latency, "ms", "analytic")
    return Metrics(Quality(retained, 0.004, Measurement(damage, 0.004), {}, 4096), resources)


def test_losses_are_damage_and_bytes_unless_one_says_otherwise():
    assert Objectives().names == ("damage", "storage_bytes")
    assert Objectives().losses(metrics()) == (0.03, 25e6)
    both = Objectives.parse("quality,latency,bytes")
    assert both.names == ("damage", LATENCY, STORAGE)
    assert both.losses(metrics(latency=2.5)) == (0.03, 2.5, 25e6)


def test_a_better_model_has_smaller_losses():
    better = metrics(retained=0.99, damage=0.01, storage=20e6, latency=0.9)
    for text in ("quality,bytes", "quality,latency", "quality,bytes,latency"):
        losses = Objectives.parse(text).losses
        assert all(low < high for low, high in zip(losses(better), losses(metrics()), strict=True))


def test_what_is_written_reads_back_whatever_resources_are_named():
    for number in range(1, len(RESOURCE_NAMES) + 1):
        for names in itertools.permutations(RESOURCE_NAMES.values(), number):
            assert Objectives.parse(Objectives(names).text) == Objectives(names)
    assert Objectives.parse(" bytes , quality") == Objectives()
    assert Objectives.parse("quality,bytes_moved,bytes,latency").words == (
        "bytes moved, bytes and latency"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("quality,latencies", "Did you mean 'latency'"),
        ("bytes", "--optimize quality,bytes"),
        ("quality", "at least one resource"),
        ("quality,quality,bytes", "names quality once"),
        ("quality,bytes,bytes", "each named once, but got 'quality,bytes,bytes'"),
        ("", "Available"),
    ],
)
def test_wrong_objectives_are_refused_with_the_nearest_right_ones(text, says):
    with pytest.raises(UsageError, match=says):
        Objectives.parse(text)


def test_a_resource_that_does_not_sum_over_layers_is_refused():
    with pytest.raises(UsageError, match="peak_memory_bytes"):
        Objectives(("peak_memory_bytes",))


def test_a_resource_that_is_not_stated_is_no_number():
    assert math.isnan(cost_of(metrics(latency=None), LATENCY))


def test_sums_of_the_same_times_are_equal_in_any_order():
    draw = random.Random(0)
    times = [draw.uniform(0.001, 0.2) for _ in range(200)]
    sums = set()
    for _ in range(50):
        draw.shuffle(times)
        sums.add(sum(times))
    assert len(sums) > 1
    assert len({comparable(total) for total in sums}) == 1
    assert comparable(123_456_789_012_345.0) == 123_456_789_012_345.0  # bytes stay exact
