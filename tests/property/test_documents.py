"""Every field of every document that a run leaves is read back as it was written.

The strategies fill all fields of a dataclass, optional ones too, so a field that is not written, or
that the schema does not know, fails here.
"""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autocompress.core import (
    Allocation,
    Bar,
    Elapsed,
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
from autocompress.core.objectives import RESOURCE_NAMES
from autocompress.cost import DeviceProfile, LatencyTable, LayerTime, PassTimes
from autocompress.cost.profile_file import read_profile, write_profile
from autocompress.export.manifest import FileRecord, Manifest
from autocompress.fronts import (
    BaseEntry,
    BudgetSpent,
    Comparison,
    Difference,
    Finalized,
    FrontDocument,
    Member,
    MemberQuality,
    ReferencePoint,
    StudySummary,
    Verdict,
)
from autocompress.search import Journal
from autocompress.search.dnas.preferences import Preference
from autocompress.search.option_table import OptionTable
from autocompress.spaces import SearchSpace
from autocompress.spaces.space import Choice, Option
from autocompress.workflows.predictions import Predictions
from autocompress.workflows.settings import SearchSettings, StudyRecord

laws = settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

numbers = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(1e-6, 1e12)
counts = st.integers(1, 10**12)
words = st.text("abcXYZ019_.", min_size=1, max_size=8)
texts = st.text(max_size=8)
schemes = st.sampled_from(["rtn(bits=4)", "drop", "tied(blocks=0/1)+gptq(bits=2)", "base"])
resource_names = st.sampled_from(sorted(RESOURCE_NAMES.values()))


def filled(cls: type, **strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Values of a dataclass, each of whose fields has a strategy."""
    wanted = {f.name for f in fields(cls) if f.init}
    assert wanted == set(strategies), f"{cls.__name__}: {wanted ^ set(strategies)}"
    return st.builds(cls, **strategies)


def by_name(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(words, values, max_size=2)


def several(values: st.SearchStrategy[Any], least: int = 0) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, min_size=least, max_size=2).map(tuple)


measurements = filled(Measurement, value=numbers, standard_error=numbers)
resources = st.dictionaries(
    resource_names, filled(Resource, value=numbers, unit=texts, origin=texts), max_size=3
)
objectives = st.lists(resource_names, min_size=1, max_size=4, unique=True).map(
    lambda names: Objectives(tuple(names))
)
qualities = filled(
    MemberQuality, retained=numbers, standard_error=numbers, metrics=by_name(measurements)
)
finalized = filled(
    Finalized,
    searched_as=words, statistics=words, statistics_digest=words, changed=by_name(schemes),
    search_damage=measurements, rebuilt_damage=measurements, difference=measurements,
    block_steps=st.integers(0, 10_000), report_damages=several(numbers),
)  # fmt: skip
entry = {
    "id": words, "bits_per_weight": positive, "storage_bytes": counts, "size_reduction": positive,
    "quality": qualities, "resources": resources, "cost_efficiency": numbers,
    "allocation": by_name(schemes), "source": texts, "is_knee": st.booleans(),
}  # fmt: skip
members = filled(Member, **entry, name=texts, finalized=finalized | st.none())
baselines = filled(Member, **entry, name=words, finalized=st.none())
studies = filled(
    StudySummary,
    model=texts, task=texts, space=texts, sampler=texts, seed=st.integers(),
    budget_spent=filled(
        BudgetSpent, trials=counts, seconds=st.floats(0, 1e9), tokens=st.integers(0, 10**9)
    ),
    details=by_name(st.none() | numbers | texts | by_name(texts)),
)  # fmt: skip
differences = filled(
    Difference, retained=measurements, damage=measurements, n_sequences=counts
) | st.builds(Difference, measurements)
comparisons = filled(
    Comparison,
    baseline=words, verdict=st.sampled_from(Verdict), member=words, is_itself=st.booleans(),
    bytes_saved=st.integers(-(10**9), 10**9), difference=differences,
    saved=by_name(st.floats(0, 1e9)), judged=st.just("") | words,
    chosen_on=st.sampled_from(["search", "report"]),
) | st.builds(Comparison, words, st.just(Verdict.NONE))  # fmt: skip
documents = filled(
    FrontDocument,
    study=studies,
    base=filled(BaseEntry, storage_bytes=counts, quality=qualities, resources=resources),
    baselines=several(baselines),
    members=several(members),
    reference_point=filled(
        ReferencePoint,
        quality_loss=positive,
        relative=st.dictionaries(resource_names, positive, min_size=1, max_size=3),
    ),
    hypervolume=st.floats(0, 1e9),
    comparisons=several(comparisons),
    objectives=objectives,
)


@laws
@given(documents)
def test_a_front_with_all_its_fields(document):
    with TemporaryDirectory() as folder:
        document.write(folder)
        assert FrontDocument.read(folder) == document


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_finalized_member_that_is_nowhere_finite_still_makes_a_front(bad, tmp_path):
    broken = Measurement(bad, bad)
    rebuilt = Finalized("a", "b", "c", {}, broken, broken, broken, 3, (bad, 1.0))
    quality = MemberQuality(bad, bad, {"perplexity": broken})
    costs = {"macs_per_token": Resource(bad, "macs", "analytic")}
    member = Member("a", 4.0, 10, 2.0, quality, costs, bad, {}, finalized=rebuilt)
    study = StudySummary("m", "t", "s", "r", 0, BudgetSpent(1, 1.0, 1))
    base = BaseEntry(20, quality, costs)
    FrontDocument(study, base, (), (member,), ReferencePoint(), 0.5).write(tmp_path)
    found = FrontDocument.read(tmp_path).members[0].finalized
    assert found is not None
    assert math.isnan(found.report_damages[0])
    assert found.report_damages[1] == 1.0


trials = filled(
    TrialResult,
    request=filled(
        TrialRequest,
        number=counts,
        allocation=st.dictionaries(words, schemes.map(Scheme.parse)).map(Allocation.of),
        source=texts,
        bar=st.none() | filled(Bar, trial=counts, damages=several(numbers)),
    ),
    status=st.sampled_from(TrialStatus),
    metrics=st.none()
    | filled(
        Metrics,
        quality=filled(
            Quality, retained=numbers, standard_error=numbers, damage=measurements,
            metrics=by_name(measurements), n_tokens=counts,
        ),
        resources=resources,
    ),
    seconds=st.integers(0, 10**6).map(lambda n: n / 4),  # kept to four decimals
    n_tokens=counts, error=texts, attempts=counts, notes=several(texts),
    sampler_state=by_name(numbers | texts), damages=several(numbers),
    elapsed=st.none() | filled(Elapsed, seconds=numbers, gpu_seconds=numbers),
)  # fmt: skip


@laws
@given(trials)
def test_a_trial_with_all_its_fields(trial):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trials.jsonl"
        with Journal(path) as journal:
            journal.append(trial)
        with Journal(path) as journal:
            assert journal.read() == [trial]


limits = st.lists(st.sampled_from(["3 trials", "30m", "2e6 tokens", "yes"]), max_size=2).map(tuple)
asked = filled(
    SearchSettings,
    model=texts, task=texts, data=texts, space=texts, target=st.sampled_from(["any", "vllm"]),
    rotate=st.sampled_from(["none", "hadamard"]), sampler=texts, budget=limits,
    driver=st.just("ray"), workers=counts, gpus_per_worker=st.floats(0, 8),
    address=st.none() | texts, seed=st.integers(), device=texts,
    dtype=st.sampled_from(["auto", "float16"]), calibration_tokens=counts, search_tokens=counts,
    report_tokens=counts, sequence_length=st.integers(8, 10**6),
    trial_timeout_seconds=st.none() | positive, device_profile=texts,
    trust_remote_code=st.booleans(), token_weighting=st.sampled_from(["gradient", "none"]),
    cache=st.none() | texts, bank_size=st.none() | texts, aim=limits, finalize=st.booleans(),
    optimize=objectives.map(lambda o: o.text),
)  # fmt: skip
resolved = by_name(numbers | texts | by_name(st.lists(st.integers(), max_size=3)))


@laws
@given(filled(StudyRecord, settings=asked, resolved=resolved))
def test_a_study_with_all_its_fields(record):
    with TemporaryDirectory() as folder:
        record.write(Path(folder))
        assert StudyRecord.read(Path(folder)) == record


times = filled(
    PassTimes,
    n_tokens=counts,
    rest=st.floats(0, 1e3),
    layers=st.dictionaries(
        texts, filled(LayerTime, seconds=st.floats(0, 1e3), roofline=positive), min_size=1
    ),
)
profiles = filled(
    DeviceProfile,
    name=texts, flops_per_second=positive, bytes_per_second=positive, memory_bytes=counts,
    origin=texts,
    latency=st.none()
    | filled(
        LatencyTable, model=texts, layers=texts, dtype=texts,
        passes=st.lists(times, min_size=1, max_size=3, unique_by=lambda t: t.n_tokens).map(
            lambda passes: tuple(sorted(passes, key=lambda t: t.n_tokens))
        ),
    ),
)  # fmt: skip


@laws
@given(profiles)
def test_a_device_profile_with_all_its_fields(profile):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "here.json"
        write_profile(profile, path)
        assert read_profile(path) == profile
        assert read_profile(path).digest == profile.digest


options = filled(
    Option, label=texts, schemes=several(schemes.map(Scheme.parse), 1), storage_bytes=counts
)
choices = filled(
    Choice, name=texts, layers=several(words), options=several(options), base_bytes=counts
)
spaces = filled(
    SearchSpace,
    name=texts, description=texts, choices=several(choices), n_dropped=counts, n_merged=counts,
)  # fmt: skip
rows = several(st.lists(positive, min_size=2, max_size=2).map(np.array), 1)


@st.composite
def tables(draw: st.DrawFn) -> OptionTable:
    damage = draw(rows)
    n = len(damage)
    per_choice = st.lists(
        st.lists(positive, min_size=2, max_size=2).map(np.array), min_size=n, max_size=n
    ).map(tuple)
    rarely = np.array([-np.inf, 0.0])
    preference = filled(
        Preference,
        weight=positive,
        log_probabilities=per_choice | st.just((rarely,) * n),
    )
    return draw(
        filled(
            OptionTable,
            names=st.just(("a", "b")[:n]),
            roles=st.just(("query", "other")[:n]),
            depths=st.just((-1.0, 0.5)[:n]),
            labels=st.just((("x", "y"),) * n),
            damage=st.just(damage),
            costs=st.dictionaries(resource_names, per_choice, max_size=2),
            fixed=st.dictionaries(resource_names, numbers),
            preferences=several(preference),
        )
    )


@laws
@given(filled(Predictions, space=spaces, table=tables(), objectives=objectives))
def test_predictions_with_all_their_fields(predictions):
    with TemporaryDirectory() as folder:
        predictions.write(Path(folder))
        found = Predictions.read(Path(folder))
    assert (found.space, found.objectives) == (predictions.space, predictions.objectives)
    assert found.space.n_dropped == predictions.space.n_dropped
    assert found.space.n_merged == predictions.space.n_merged
    assert repr(found.table) == repr(predictions.table)


def hexadecimal(n: int) -> st.SearchStrategy[str]:
    return st.text("0123456789abcdef", min_size=n, max_size=n)


published = filled(
    MemberQuality, retained=numbers | st.just(math.nan), standard_error=numbers | st.just(math.inf),
    metrics=by_name(measurements | st.just(Measurement(math.inf, math.nan))),
)  # fmt: skip
long_schemes = schemes | st.just(f"merged(experts={'/'.join(map(str, range(512)))})")
manifests = filled(
    Manifest,
    checkpoint_format=st.sampled_from(["packed", "compressed-tensors"]),
    auto_class=st.sampled_from(["AutoModel", "AutoModelForSeq2SeqLM"]), base_model=texts,
    base_digest=texts, storage_bytes=counts, file_bytes=counts,
    claim=st.builds(
        lambda quality, efficiency: {
            "quality": quality.to_json(),
            "cost_efficiency": efficiency,
            "resources": {"macs_per_token": {"value": None, "unit": "macs", "origin": "x"}},
            "measured": {},
        },
        published,
        st.none() | numbers,
    ),
    allocation=by_name(long_schemes), notes=by_name(several(texts)),
    files=st.dictionaries(
        st.sampled_from(["model.safetensors", "1_Pooling/config.json"]),
        filled(FileRecord, bytes=counts, sha256=hexadecimal(64)), min_size=1,
    ),
    tensors=by_name(hexadecimal(32)), libraries=by_name(texts),
    verification=st.none() | st.just({"passed": False, "checks": []}),
)  # fmt: skip


@laws
@given(manifests)
def test_a_manifest_with_all_its_fields(manifest):
    with TemporaryDirectory() as folder:
        manifest.write(Path(folder))
        assert Manifest.read(Path(folder)) == manifest
