"""Judging one model against thresholds, as `autocompress gate` does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from autocompress.core import LATENCY, Resources
from autocompress.core.errors import CheckpointError, UsageError
from autocompress.core.metrics import require_share
from autocompress.core.nullable import or_nan, or_null


class _Quality(Protocol):
    @property
    def retained(self) -> float: ...
    @property
    def standard_error(self) -> float: ...


class _Member(Protocol):
    """What a gate reads of a front's member."""

    @property
    def id(self) -> str: ...
    @property
    def storage_bytes(self) -> int: ...
    @property
    def quality(self) -> _Quality: ...
    @property
    def cost_efficiency(self) -> float: ...
    @property
    def resources(self) -> Resources: ...


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is judged; a number that is not known is NaN and passes no check.

    Attributes:
        id: of the member.
        retained: quality relative to the base model.
        standard_error: of `retained`.
        storage_bytes: bytes of the tensors.
        cost_efficiency: 1 is the base model.
        latency_ms_per_token: time per token.
        latency_origin: where that is from.
    """

    id: str
    retained: float
    standard_error: float
    storage_bytes: int
    cost_efficiency: float = math.nan
    latency_ms_per_token: float = math.nan
    latency_origin: str = ""

    @classmethod
    def of_member(cls, member: _Member) -> Candidate:
        """A member of a front, or a baseline."""
        latency = member.resources.get(LATENCY)
        return cls(
            member.id,
            member.quality.retained,
            member.quality.standard_error,
            member.storage_bytes,
            member.cost_efficiency,
            math.nan if latency is None else latency.value,
            "" if latency is None else latency.origin,
        )

    @classmethod
    def of_claim(cls, claim: Mapping[str, Any], *, storage_bytes: int) -> Candidate:
        """An export: the claim in its manifest, and the bytes that its files hold now.

        Raises:
            CheckpointError: the claim lacks a field.
        """
        try:
            latency = claim["resources"].get(LATENCY, {})
            return cls(
                str(claim["member"]),
                or_nan(claim["quality"]["retained"]),
                or_nan(claim["quality"]["standard_error"]),
                storage_bytes,
                or_nan(claim["cost_efficiency"]),
                or_nan(latency.get("value")),
                str(latency.get("origin", "")),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"The manifest's claim is damaged ({type(error).__name__}: {error}). Next step: "
                "export the member again."
            ) from error

    def to_json(self) -> dict[str, Any]:
        """A JSON object; what is not known is null."""
        return {
            "id": self.id,
            "retained": or_null(self.retained),
            "standard_error": or_null(self.standard_error),
            "storage_bytes": self.storage_bytes,
            "cost_efficiency": or_null(self.cost_efficiency),
            "latency_ms_per_token": or_null(self.latency_ms_per_token),
            "latency_origin": self.latency_origin or None,
        }


@dataclass(frozen=True, slots=True)
class Check:
    """One threshold and how the candidate stands to it.

    Attributes:
        name: ``retained``, ``storage_bytes``, ``cost_efficiency`` or ``latency_ms_per_token``.
        value: of the candidate; NaN if not known.
        threshold: least or most allowed value.
        is_floor: True if the value must be at least the threshold, False if at most.
        passed: equality passes, NaN does not.
        standard_error: of the value; 0 for what is counted, not measured.
        origin: of the value, where that is not the same for all candidates.
    """

    name: str
    value: float
    threshold: float
    is_floor: bool
    passed: bool
    standard_error: float = 0.0
    origin: str = ""

    @property
    def is_within_noise(self) -> bool:
        """True if the value is less than two standard errors away from the threshold."""
        return abs(self.value - self.threshold) < 2 * self.standard_error

    def to_json(self) -> dict[str, Any]:
        """A JSON object; what is not known is null."""
        return {
            "name": self.name,
            "value": or_null(self.value),
            "threshold": or_null(self.threshold),
            "rule": "at least" if self.is_floor else "at most",
            "passed": self.passed,
            "standard_error": or_null(self.standard_error),
            "within_noise": self.is_within_noise,
            **({"origin": self.origin} if self.origin else {}),
        }


def judge(
    candidate: Candidate,
    *,
    min_quality: float | None = None,
    max_bytes: int | None = None,
    min_cost_efficiency: float | None = None,
    max_latency_ms: float | None = None,
) -> list[Check]:
    """Check a candidate against every threshold that is given.

    Thresholds meet the measured values as they are: a value within noise of its threshold passes
    or fails like any other, and the check says that it is within noise.

    Raises:
        UsageError: no threshold was given, so that everything would pass; one is NaN; or the
            quality is in percent.
    """
    require_share("--min-quality", min_quality)
    rules = (
        ("retained", candidate.retained, min_quality, True, candidate.standard_error),
        ("storage_bytes", candidate.storage_bytes, max_bytes, False, 0.0),
        ("cost_efficiency", candidate.cost_efficiency, min_cost_efficiency, True, 0.0),
        ("latency_ms_per_token", candidate.latency_ms_per_token, max_latency_ms, False, 0.0),
    )
    checks = [
        replace(
            _check(name, float(value), float(threshold), is_floor, error),
            origin=candidate.latency_origin if name == LATENCY else "",
        )
        for name, value, threshold, is_floor, error in rules
        if threshold is not None
    ]
    if not checks:
        raise UsageError(
            "A gate needs a threshold, but none was given. Next step: give a least quality or "
            "cost efficiency, or a most of bytes or latency."
        )
    return checks


def _check(
    name: str, value: float, threshold: float, is_floor: bool, standard_error: float
) -> Check:
    if math.isnan(threshold):
        raise UsageError(f"A threshold is a number, but that of {name} is NaN.")
    passed = value >= threshold if is_floor else value <= threshold
    return Check(name, value, threshold, is_floor, passed, standard_error)
