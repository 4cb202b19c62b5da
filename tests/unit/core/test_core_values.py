from __future__ import annotations

import dataclasses
import json
import math

import pytest

from autocompress.core import (
    Allocation,
    Footprint,
    LayerSpec,
    Measurement,
    Metrics,
    Quality,
    Resource,
    TensorLayout,
    TrialRequest,
    TrialResult,
    TrialStatus,
    digest,
)

LAYER = LayerSpec(
    "model.layers.0.mlp.up_proj", "up", 0, 1536, 384, "linear", "bfloat16",
    "model.layers.0.mlp", 1536 * 384, ("lm_head",),
)  # fmt: skip


def quality(**changes):
    values = {
        "retained": 0.97, "standard_error": 0.004, "damage": Measurement(0.03, 0.004),
        "metrics": {"perplexity": Measurement(21.5, 0.3)}, "n_tokens": 4096,
    }  # fmt: skip
    return Quality(**{**values, **changes})


def metrics():
    return Metrics(quality(), {"storage_bytes": Resource(22_100_000, "bytes", "analytic")})


def test_a_layer_counts_its_weights_and_bytes():
    assert LAYER.n_weights == 1536 * 384
    assert LAYER.base_bytes == 2 * 1536 * 384


def test_a_layer_reads_back_from_json_text():
    assert LayerSpec.from_json(json.loads(json.dumps(LAYER.to_json()))) == LAYER


def test_a_footprint_adds_up_its_tensors():
    footprint = Footprint(
        {
            "packed": TensorLayout((100,), "uint8"),
            "scales": TensorLayout((4, 8), "float16"),
            "values": TensorLayout((), "float32"),
        },
        macs_per_token=7,
    )
    assert footprint.storage_bytes == 100 + 64 + 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_quality_is_finite_only_if_retained_and_damage_are(bad):
    assert quality().is_finite
    assert not quality(retained=bad).is_finite
    assert not quality(damage=Measurement(bad, 0.0)).is_finite


def test_metrics_know_their_stored_bytes():
    assert metrics().storage_bytes == 22_100_000
    assert isinstance(metrics().storage_bytes, int)


def test_a_request_knows_whether_it_is_a_baseline():
    uniform = TrialRequest(1, Allocation(), "baseline:uniform-4bit")
    sampled = TrialRequest(2, Allocation(), "sampler:tpe")
    assert (uniform.is_baseline, uniform.baseline_name) == (True, "uniform-4bit")
    assert (sampled.is_baseline, sampled.baseline_name) == (False, None)


def test_only_a_complete_trial_with_metrics_is_complete():
    request = TrialRequest(0, Allocation(), "sampler:random")
    assert TrialResult(request, TrialStatus.COMPLETE, metrics()).is_complete
    assert not TrialResult(request, TrialStatus.COMPLETE).is_complete
    assert not TrialResult(request, TrialStatus.FAILED, metrics()).is_complete


def test_a_journal_line_names_the_trial_by_its_allocation():
    allocation = Allocation.from_json({"a": "rtn(bits=4)"})
    line = TrialResult(
        TrialRequest(3, allocation, "sampler:tpe"), TrialStatus.TIMED_OUT, seconds=60.00004,
        error="Took longer than 60 s.",
    ).to_json()  # fmt: skip
    assert line["id"] == allocation.digest
    assert line["status"] == "timed_out"
    assert line["seconds"] == 60.0
    assert line["metrics"] is None
    assert json.loads(json.dumps(line)) == line


def test_values_cannot_be_changed():
    for value in (LAYER, quality(), metrics(), TensorLayout((1,), "int8")):
        name = dataclasses.fields(value)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)


def test_a_digest_of_nan_is_refused_since_nan_equals_nothing():
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest({"x": math.nan})
