"""Small made-up fronts."""

from __future__ import annotations

import math

from autocompress.core import Measurement, Resource
from autocompress.fronts import (
    BaseEntry,
    BudgetSpent,
    FrontDocument,
    Member,
    MemberQuality,
    StudySummary,
)

BASE_BYTES = 100_000_000


def make_member(name, megabytes, retained, efficiency=1.0, latency=1.0, *, is_baseline=False):
    resources = {"storage_bytes": Resource(megabytes * 1e6, "bytes", "analytic")}
    if not math.isnan(latency):
        resources["latency_ms_per_token"] = Resource(latency, "ms", "analytic (roofline of x)")
    return Member(
        id=f"{name}{'0' * 8}",
        bits_per_weight=4.25,
        storage_bytes=round(megabytes * 1e6),
        size_reduction=BASE_BYTES / (megabytes * 1e6),
        quality=MemberQuality(retained, 0.004, {"perplexity": Measurement(20.5, 0.25)}),
        resources=resources,
        cost_efficiency=efficiency,
        allocation={"layer.0": "rtn(bits=4)"},
        name=name if is_baseline else "",
        source=f"baseline:{name}" if is_baseline else "sampler:random",
    )


def make_study(floor=None):
    details = {"data": "python-docs"}
    if floor is not None:
        details["cost_efficiency"] = {
            "version": 1, "exponents": {}, "weights": {}, "min_retained": floor,
        }  # fmt: skip
    return StudySummary(
        "some/model", "causal-lm", "joint", "random", 0, BudgetSpent(12, 34.5, 6789), details
    )


def make_document(members, baselines=(), floor=None):
    base = BaseEntry(
        BASE_BYTES, MemberQuality(1.0, 0.0, {"perplexity": Measurement(20.0, 0.25)}), {}
    )
    return FrontDocument.of(make_study(floor), base, baselines, members)
