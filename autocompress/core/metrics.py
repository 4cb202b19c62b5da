"""Measured values, each with its uncertainty, unit and origin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autocompress.core.errors import UsageError

MOST_RETAINED = 2.0
"""A threshold above it is meant in percent: no model is twice as good as its base."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """A mean with its standard error, both in the unit that the metric's name states."""

    value: float
    standard_error: float

    def to_json(self) -> dict[str, float]:
        """``{"value": ..., "standard_error": ...}``."""
        return {"value": self.value, "standard_error": self.standard_error}

    @classmethod
    def from_json(cls, data: Mapping[str, float]) -> Measurement:
        """The inverse of `to_json`."""
        return cls(float(data["value"]), float(data["standard_error"]))


@dataclass(frozen=True, slots=True)
class Quality:
    """How much of the base model's quality is left on one split of tokens.

    Attributes:
        retained: quality relative to the base model, chance-corrected; 1.0 is the base. Not
            clamped: mild compression may exceed 1.
        standard_error: of `retained`, from paired differences between sequences, noise of the
            forward's dtype included.
        damage: what the search minimises, 0 for the base (KL to the base in nats per token, or
            1 - fidelity), with its standard error.
        metrics: named measurements, e.g. ``perplexity``, ``kl_nats_per_token``, ``accuracy``.
        n_tokens: tokens that were evaluated.
    """

    retained: float
    standard_error: float
    damage: Measurement
    metrics: Mapping[str, Measurement]
    n_tokens: int

    @property
    def is_finite(self) -> bool:
        """True if neither the retained quality nor the damage is NaN or infinite."""
        return math.isfinite(self.retained) and math.isfinite(self.damage.value)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        return {
            "retained": self.retained,
            "standard_error": self.standard_error,
            "damage": self.damage.to_json(),
            "metrics": {name: m.to_json() for name, m in sorted(self.metrics.items())},
            "n_tokens": self.n_tokens,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Quality:
        """The inverse of `to_json`."""
        return cls(
            retained=float(data["retained"]),
            standard_error=float(data["standard_error"]),
            damage=Measurement.from_json(data["damage"]),
            metrics={n: Measurement.from_json(m) for n, m in data["metrics"].items()},
            n_tokens=int(data["n_tokens"]),
        )


@dataclass(frozen=True, slots=True)
class Resource:
    """One cost.

    Attributes:
        value: lower is better.
        unit: e.g. ``bytes``, ``ms``, ``macs``.
        origin: ``analytic``, ``analytic (roofline of <device profile>)`` or
            ``measured on <device>``.
    """

    value: float
    unit: str
    origin: str

    def to_json(self) -> dict[str, Any]:
        """``{"value": ..., "unit": ..., "origin": ...}``."""
        return {"value": self.value, "unit": self.unit, "origin": self.origin}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Resource:
        """The inverse of `to_json`."""
        return cls(float(data["value"]), str(data["unit"]), str(data["origin"]))


Resources = Mapping[str, Resource]
"""By name: ``storage_bytes``, ``macs_per_token``, ``bytes_moved_per_token``,
``latency_ms_per_token``, ``peak_memory_bytes``."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """All that one trial measured."""

    quality: Quality
    resources: Resources = field(default_factory=dict)

    @property
    def storage_bytes(self) -> int:
        """Bytes of the exported file's tensors."""
        return int(self.resources["storage_bytes"].value)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        return {
            "quality": self.quality.to_json(),
            "resources": {name: r.to_json() for name, r in sorted(self.resources.items())},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Metrics:
        """The inverse of `to_json`."""
        return cls(
            Quality.from_json(data["quality"]),
            {name: Resource.from_json(r) for name, r in data["resources"].items()},
        )


def require_share(name: str, retained: float | None) -> None:
    """Refuse a threshold of retained quality that was given in percent.

    Args:
        name: of the argument, for people.
        retained: the threshold; None and NaN pass.

    Raises:
        UsageError: it is above `MOST_RETAINED`.
    """
    if retained is None or not retained > MOST_RETAINED:
        return
    meant = retained / 100
    hint = f"Did you mean {meant:g}?" if meant <= MOST_RETAINED else "For example: 0.97."
    raise UsageError(
        "A retained quality is relative to the base model, which has 1 (not 100), but got "
        f"{name} {retained:g}. {hint}"
    )
