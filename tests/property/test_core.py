"""Laws of the values that everything else speaks in."""

from __future__ import annotations

import json
import math

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autocompress.core import (
    Allocation,
    Measurement,
    Metrics,
    Quality,
    Resource,
    Scheme,
    Stage,
    TrialRequest,
    TrialResult,
    TrialStatus,
    derived_seed,
    digest,
)

# A busy machine is no reason to fail.
laws = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

names = st.text("abcXYZ_019", min_size=0, max_size=6).map("k{}".format)
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


option_values = st.booleans() | st.integers(-(10**9), 10**9) | names | st.floats(1e-3, 1e3)
stages = st.builds(Stage.of, names, st.dictionaries(names, option_values, max_size=3))
schemes = st.builds(Scheme, st.lists(stages, min_size=1, max_size=3).map(tuple))
layer_names = st.lists(names, min_size=1, max_size=3).map(".".join)
allocations = st.dictionaries(layer_names, schemes | st.just(Scheme()), max_size=5).map(
    Allocation.of
)
measurements = st.builds(Measurement, finite, finite)
resources = st.builds(Resource, finite, st.text(max_size=5), st.text(max_size=9))
metrics = st.builds(
    Metrics,
    st.builds(
        Quality, finite, finite, measurements, st.dictionaries(names, measurements, max_size=3),
        st.integers(0, 10**9),
    ),
    st.dictionaries(names, resources, max_size=3),
)  # fmt: skip


@laws
@given(schemes)
def test_a_scheme_reads_back_from_its_text(scheme):
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.parse(str(scheme)).digest == scheme.digest


@laws
@given(allocations)
def test_an_allocation_reads_back_from_its_json(allocation):
    again = Allocation.from_json(json.loads(json.dumps(allocation.to_json())))
    assert again == allocation
    assert hash(again) == hash(allocation)
    assert again.digest == allocation.digest


@laws
@given(st.dictionaries(layer_names, schemes, max_size=4), st.randoms(use_true_random=False))
def test_an_allocation_does_not_depend_on_the_order_it_was_written_in(chosen, random):
    items = list(chosen.items())
    random.shuffle(items)
    assert Allocation.of(dict(items)).digest == Allocation.of(chosen).digest


@laws
@given(st.dictionaries(layer_names, schemes, max_size=4), layer_names)
def test_leaving_a_layer_uncompressed_is_the_same_as_not_naming_it(chosen, name):
    named = {**chosen, name: Scheme()}
    unnamed = {n: s for n, s in chosen.items() if n != name}
    assert Allocation.of(named) == Allocation.of(unnamed)


@laws
@given(metrics)
def test_metrics_read_back_from_their_json(measured):
    assert Metrics.from_json(json.loads(json.dumps(measured.to_json()))) == measured


@laws
@given(
    allocations, st.sampled_from(TrialStatus), metrics | st.none(), st.integers(0, 10**6),
    st.text(max_size=20), st.integers(1, 5), st.lists(st.text(max_size=9), max_size=2),
)  # fmt: skip
def test_a_trial_reads_back_from_its_journal_line(
    allocation, status, measured, tokens, error, attempts, notes
):
    trial = TrialResult(
        TrialRequest(7, allocation, "sampler:random"), status, measured, 1.25, tokens, error,
        attempts, tuple(notes), {"generation": 3},
    )  # fmt: skip
    assert TrialResult.from_json(json.loads(json.dumps(trial.to_json()))) == trial


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@laws
@given(st.dictionaries(st.text(max_size=4), json_values, max_size=4))
def test_a_digest_does_not_depend_on_the_order_of_keys(value):
    turned = dict(reversed(value.items()))
    assert digest(turned) == digest(value)
    assert len(digest(value)) == 32


@laws
@given(st.lists(st.integers() | st.text(max_size=5), max_size=4))
def test_a_derived_seed_is_a_31_bit_number_of_its_parts_alone(parts):
    seed = derived_seed(*parts)
    assert seed == derived_seed(*parts)
    assert 0 <= seed < 2**31
    assert math.isfinite(seed)
