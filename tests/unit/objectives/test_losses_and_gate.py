from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from autocompress.core import Measurement, Metrics, Quality, Resource
from autocompress.core.errors import CheckpointError, UsageError
from autocompress.objectives import Candidate, judge


def metrics(retained=0.97, damage=0.03, storage=25e6, latency=1.0):
    return Metrics(
        Quality(retained, 0.004, Measurement(damage, 0.004), {}, 4096),
        {
            "storage_bytes": Resource(storage, "bytes", "analytic"),
            "latency_ms_per_token": Resource(latency, "ms", "analytic"),
            "peak_memory_bytes": Resource(storage, "bytes", "analytic"),
        },
    )


BASE = metrics(1.0, 0.0, 100e6, 2.0)
CANDIDATE = Candidate("3fa2c1d0", 0.972, 0.004, 22_100_000, 3.8, 0.7, "analytic")


def test_a_gate_checks_only_what_it_was_given():
    checks = judge(CANDIDATE, min_quality=0.97, max_bytes=20_000_000)
    assert [(c.name, c.passed) for c in checks] == [("retained", True), ("storage_bytes", False)]


def test_a_value_on_its_threshold_passes():
    checks = judge(
        CANDIDATE, min_quality=0.972, max_bytes=22_100_000, min_cost_efficiency=3.8,
        max_latency_ms=0.7,
    )  # fmt: skip
    assert [check.passed for check in checks] == [True] * 4


def test_a_check_says_when_noise_could_turn_it_round():
    near, far = (judge(CANDIDATE, min_quality=q)[0] for q in (0.975, 0.99))
    assert (near.passed, near.is_within_noise) == (False, True)
    assert (far.passed, far.is_within_noise) == (False, False)
    assert near.standard_error == 0.004


def test_what_is_not_known_passes_no_check():
    unknown = Candidate("x", math.nan, math.nan, 1)
    checks = judge(unknown, min_quality=0.0, min_cost_efficiency=0.0, max_latency_ms=1e9)
    assert [check.passed for check in checks] == [False] * 3
    assert [check.to_json()["value"] for check in checks] == [None] * 3


def test_a_gate_without_thresholds_would_pass_everything_and_is_refused():
    with pytest.raises(UsageError, match="A gate needs a threshold"):
        judge(CANDIDATE)


def test_a_threshold_of_nan_is_refused():
    with pytest.raises(UsageError, match="that of retained is NaN"):
        judge(CANDIDATE, min_quality=math.nan)


def test_a_threshold_in_percent_is_answered_with_the_share():
    with pytest.raises(UsageError, match=r"got --min-quality 97\. Did you mean 0\.97"):
        judge(CANDIDATE, min_quality=97)
    assert not judge(CANDIDATE, min_quality=1.4)[0].passed


def test_a_check_is_one_json_object():
    check = judge(CANDIDATE, max_bytes=20_000_000)[0]
    assert json.loads(json.dumps(check.to_json(), allow_nan=False)) == {
        "name": "storage_bytes", "value": 22_100_000.0, "threshold": 20_000_000.0,
        "rule": "at most", "passed": False, "standard_error": 0.0, "within_noise": False,
    }  # fmt: skip


def test_a_check_of_latency_says_where_it_is_from():
    checks = judge(CANDIDATE, min_quality=0.9, max_latency_ms=1.0)
    assert [check.origin for check in checks] == ["", "analytic"]
    assert checks[1].to_json()["origin"] == "analytic"


def test_a_member_of_a_front_can_be_judged():
    member = SimpleNamespace(
        id="3fa2c1d0", quality=SimpleNamespace(retained=0.972, standard_error=0.004),
        storage_bytes=22_100_000, cost_efficiency=3.8,
        resources={"latency_ms_per_token": Resource(0.7, "ms", "analytic")},
    )  # fmt: skip
    assert Candidate.of_member(member) == CANDIDATE
    member.resources = {}
    assert math.isnan(Candidate.of_member(member).latency_ms_per_token)


CLAIM = {
    "member": "3fa2c1d0",
    "quality": {"retained": 0.972, "standard_error": 0.004, "metrics": {}},
    "cost_efficiency": 3.8,
    "resources": {"latency_ms_per_token": {"value": 0.7, "unit": "ms", "origin": "analytic"}},
    "storage_bytes": 1,
}


def test_an_export_is_judged_by_the_bytes_its_files_hold_now():
    assert Candidate.of_claim(CLAIM, storage_bytes=22_100_000) == CANDIDATE


def test_a_claim_may_leave_out_what_is_not_known():
    candidate = Candidate.of_claim(
        {**CLAIM, "cost_efficiency": None, "resources": {}}, storage_bytes=5
    )
    assert math.isnan(candidate.cost_efficiency)
    assert candidate.to_json()["latency_ms_per_token"] is None


@pytest.mark.parametrize("damage", [{"quality": None}, {"resources": 3}, {"member": ...}])
def test_a_damaged_claim_is_a_damaged_checkpoint(damage):
    claim = {k: v for k, v in (CLAIM | damage).items() if v is not ...}
    with pytest.raises(CheckpointError, match="manifest's claim is damaged"):
        Candidate.of_claim(claim, storage_bytes=1)
