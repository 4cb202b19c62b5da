"""Metrics as losses: the one place where the direction of an objective is decided.

Everything that leaves here is minimised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autocompress.core import Metrics, Resource
from autocompress.core.errors import UsageError, nearest
from autocompress.objectives.cost_efficiency import CostEfficiency


@dataclass(frozen=True, slots=True)
class Objectives:
    """Which losses a search minimises: damage, stored bytes, and chosen resources.

    Attributes:
        resources: names of further resources, e.g. ``latency_ms_per_token``.
    """

    resources: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each loss, in the order of `losses`."""
        return ("damage", "storage_bytes", *self.resources)

    def losses(self, metrics: Metrics) -> tuple[float, ...]:
        """Losses of a measured model, all minimised; NaN where the measurement is NaN.

        Raises:
            UsageError: a resource was not measured.
        """
        return (
            metrics.quality.damage.value,
            *(_resource(metrics, name).value for name in ("storage_bytes", *self.resources)),
        )


def scalar_loss(metrics: Metrics, base: Metrics, definition: CostEfficiency) -> float:
    """Cost efficiency as a single loss: the negative logarithm of the score.

    Infinite for a model below the floor of the definition, and for NaN.
    """
    retained = metrics.quality.retained
    if not definition.is_feasible(retained):
        return math.inf
    score = definition.score(retained, metrics.resources, base.resources)
    return math.inf if math.isnan(score) or score <= 0 else -math.log(score)


@dataclass(frozen=True, slots=True)
class Limits:
    """Constraints of a search.

    Attributes:
        min_quality: least retained quality, or None.
        max_resources: most of a resource, by name; ``storage_bytes`` among them.
    """

    min_quality: float | None = None
    max_resources: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name, limit in (self.max_resources or {}).items():
            if not limit > 0:
                raise UsageError(f"A limit is above 0, but that of {name} is {limit}.")

    def violations(self, metrics: Metrics) -> dict[str, float]:
        """How far each constraint is broken: feasible iff every value is at most 0.

        Relative to the limit, so that violations of different constraints compare; NaN counts as
        infinitely broken. The names and signs are those of Optuna's constraints.

        Raises:
            UsageError: a limited resource was not measured.
        """
        found: dict[str, float] = {}
        if self.min_quality is not None:
            found["min_quality"] = self.min_quality - metrics.quality.retained
        for name, limit in (self.max_resources or {}).items():
            found[f"max_{name}"] = _resource(metrics, name).value / limit - 1.0
        return {name: math.inf if math.isnan(v) else v for name, v in found.items()}


def _resource(metrics: Metrics, name: str) -> Resource:
    if name not in metrics.resources:
        raise UsageError(f"No resource {name!r} was measured. {nearest(name, metrics.resources)}")
    return metrics.resources[name]
