"""Cost efficiency: one number that ranks the members of a front.

``cost_efficiency = performance^a / resources^r * size_reduction^s``, relative to the base model,
which scores exactly 1. With a = r = s = 1 a broken model that is small enough wins (0.55 retained
at 8x scores 4.4, 0.97 at 4x only 3.9), so performance weighs more by default and a floor on
retained quality is part of the definition. On log axes the score is linear: maximising it finds
only convex-hull points of a front, which is why a search optimises the losses and ranks by this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from autocompress.core import LATENCY, STORAGE, Resource, Resources
from autocompress.core.errors import UsageError, nearest
from autocompress.core.metrics import require_share

COST_EFFICIENCY_VERSION = 1
"""Raised whenever equal inputs could give another score."""

DEFAULT_MIN_RETAINED = 0.9
"""Default floor on retained quality."""

_LARGEST_EXPONENT = math.log(1e308)


def default_weights() -> dict[str, float]:
    """Time per token and peak memory, equally. File size is no resource: it has its own factor."""
    return {LATENCY: 1.0, "peak_memory_bytes": 1.0}


@dataclass(frozen=True, slots=True)
class Exponents:
    """How much each factor counts; finite and not negative, so that the score is monotone."""

    performance: float = 3.0
    resources: float = 1.0
    size_reduction: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(
                    f"An exponent of cost efficiency is finite and at least 0, but {name} is "
                    f"{value}. The defaults are performance=3, resources=1, size_reduction=1."
                )


def cost_efficiency(
    performance: float,
    resources: float,
    size_reduction: float,
    *,
    exponents: Exponents = Exponents(),
) -> float:
    """``performance^a / resources^r * size_reduction^s``.

    Never falls when performance or size reduction grow or resources shrink; 1 for the base model
    (1, 1, 1); without unit.

    Args:
        performance: retained quality; 1.0 is the base. Below 0 (worse than chance) counts as 0.
        resources: cost to deploy relative to the base, as `relative_resources` gives it.
        size_reduction: base bytes over compressed bytes.
        exponents: a, r and s.

    Returns:
        The score; NaN if any argument is NaN.

    Raises:
        UsageError: resources or size reduction is not positive and finite, or performance is
            infinite.
    """
    if math.isnan(performance) or math.isnan(resources) or math.isnan(size_reduction):
        return math.nan
    _require_positive("resources", resources)
    _require_positive("size_reduction", size_reduction)
    if math.isinf(performance):
        raise UsageError(f"Performance is finite, but got {performance}. The base model has 1.")
    gain = exponents.size_reduction * math.log(size_reduction)
    log_rest = gain - exponents.resources * math.log(resources)
    if performance <= 0:
        # x^0 is 1 for every x, so a performance that does not count may be 0 as well.
        return 0.0 if exponents.performance > 0 else _exp(log_rest)
    return _exp(exponents.performance * math.log(performance) + log_rest)


def relative_resources(
    resources: Resources, base: Resources, weights: Mapping[str, float] | None = None
) -> float:
    """Weighted geometric mean of costs relative to the base model.

    Args:
        resources: costs of the compressed model.
        base: costs of the base model, in the same units and of the same kind of origin.
        weights: weight by resource name, at least 0 and not all 0; `default_weights` by default.
            Naming `storage_bytes` here counts file size twice, since size reduction is a factor
            of its own.

    Returns:
        1.0 for the base model; NaN if a cost with a weight above 0 is NaN.

    Raises:
        UsageError: a named cost is missing or not positive, units differ, an analytic cost meets
            a measured one, or the weights are not usable.
    """
    chosen = default_weights() if weights is None else weights
    total = sum(chosen.values())
    if not (math.isfinite(total) and total > 0 and min(chosen.values()) >= 0):
        raise UsageError(
            f"Resource weights are at least 0 and not all 0, but got {dict(chosen)}. The default "
            f"is {default_weights()}."
        )
    logs = (
        weight * _log_ratio(name, _named(name, resources), _named(name, base))
        for name, weight in chosen.items()
        if weight > 0
    )
    return _exp(sum(logs) / total)


@dataclass(frozen=True, slots=True)
class ProduceCost:
    """What making a model costs, spread over what it will serve.

    Attributes:
        seconds: search and recovery time.
        served_tokens: tokens that the model will serve over its life; a stated assumption.
    """

    seconds: float
    served_tokens: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds >= 0 and self.served_tokens > 0):
            raise UsageError(
                "A cost to produce is a number of seconds, at least 0, over a number of served "
                f"tokens above 0, but got {self.seconds} s over {self.served_tokens} tokens."
            )

    @property
    def ms_per_token(self) -> float:
        """Milliseconds of production behind each served token."""
        return 1000.0 * self.seconds / self.served_tokens

    def added_to(self, resources: Resources) -> Resources:
        """The resources with the amortised time added to the time per token.

        The base model costs nothing to produce, so its resources stay as they are.

        Raises:
            UsageError: there is no ``latency_ms_per_token`` to add to.
        """
        latency = _named(LATENCY, resources)
        note = f" + {self.seconds:g} s to produce over {self.served_tokens:g} tokens"
        paid = replace(
            latency, value=latency.value + self.ms_per_token, origin=latency.origin + note
        )
        return {**resources, LATENCY: paid}


@dataclass(frozen=True, slots=True)
class CostEfficiency:
    """A complete definition of cost efficiency: search, gate and Python API share one.

    Attributes:
        exponents: how much each factor counts.
        weights: resource name to weight in `relative_resources`.
        min_retained: floor on retained quality; a model below it is not feasible, whatever its
            score.
        version: of the formula.
    """

    exponents: Exponents = Exponents()
    weights: Mapping[str, float] = field(default_factory=default_weights)
    min_retained: float = DEFAULT_MIN_RETAINED
    version: int = COST_EFFICIENCY_VERSION

    def __post_init__(self) -> None:
        require_share("min_retained", self.min_retained)
        if self.version != COST_EFFICIENCY_VERSION:
            raise UsageError(
                f"This version of autocompress computes cost efficiency version "
                f"{COST_EFFICIENCY_VERSION}, but got {self.version}. Scores of two versions do "
                "not compare. Next step: use the autocompress that wrote it, or score again."
            )

    def score(
        self,
        retained: float,
        resources: Resources,
        base: Resources,
        *,
        produce: ProduceCost | None = None,
    ) -> float:
        """Score of a compressed model; 1 for the base itself, NaN if an input is NaN.

        Args:
            retained: quality relative to the base model.
            resources: its costs, `storage_bytes` among them.
            base: costs of the base model, `storage_bytes` among them.
            produce: count what making the model cost as well.

        Raises:
            UsageError: a cost is missing, not positive, or not comparable.
        """
        paid = resources if produce is None else produce.added_to(resources)
        return cost_efficiency(
            retained,
            relative_resources(paid, base, self.weights),
            math.exp(-_log_ratio(STORAGE, _named(STORAGE, resources), _named(STORAGE, base))),
            exponents=self.exponents,
        )

    def is_feasible(self, retained: float) -> bool:
        """True if the retained quality reaches the floor; False for NaN."""
        return retained >= self.min_retained

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        return {
            "version": self.version,
            "exponents": asdict(self.exponents),
            "weights": dict(self.weights),
            "min_retained": self.min_retained,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CostEfficiency:
        """The inverse of `to_json`; raises `UsageError` for another version of the formula."""
        return cls(
            Exponents(**data["exponents"]),
            dict(data["weights"]),
            float(data["min_retained"]),
            int(data["version"]),
        )


def _named(name: str, resources: Resources) -> Resource:
    if name not in resources:
        raise UsageError(f"Cost efficiency needs the resource {name!r}. {nearest(name, resources)}")
    return resources[name]


def _log_ratio(name: str, ours: Resource, base: Resource) -> float:
    if ours.unit != base.unit or _kind(ours) != _kind(base):
        raise UsageError(
            f"Only like compares with like, but {name} is in {ours.unit} ({ours.origin}) and that "
            f"of the base in {base.unit} ({base.origin}). Next step: take both the same way."
        )
    if math.isnan(ours.value) or math.isnan(base.value):
        return math.nan
    _require_positive(name, ours.value)
    _require_positive(f"{name} of the base", base.value)
    return math.log(ours.value) - math.log(base.value)


def _kind(resource: Resource) -> str:
    """``analytic`` or ``measured``: the first word of an origin."""
    return resource.origin.split(" ", 1)[0]


def _require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UsageError(
            f"Cost efficiency needs {name} to be finite and above 0, but got {value}; the base "
            "model has 1."
        )


def _exp(exponent: float) -> float:
    return math.inf if exponent > _LARGEST_EXPONENT else math.exp(exponent)
