"""The values inside `front.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autocompress.core import (
    DEFAULT_OBJECTIVES,
    LATENCY,
    Measurement,
    Objectives,
    Quality,
    Resource,
    Resources,
)
from autocompress.core.nullable import or_nan, or_null

_RELATIVE = "relative_"


@dataclass(frozen=True, slots=True)
class MemberQuality:
    """Quality on report tokens.

    Attributes:
        retained: relative to the base model, chance-corrected; 1.0 is the base.
        standard_error: of `retained`.
        metrics: named measurements; the unit is in the name.
    """

    retained: float
    standard_error: float
    metrics: Mapping[str, Measurement] = field(default_factory=dict)

    @classmethod
    def of(cls, quality: Quality) -> MemberQuality:
        """The published part of a measured quality."""
        return cls(quality.retained, quality.standard_error, dict(quality.metrics))

    def to_json(self) -> dict[str, Any]:
        """A JSON object; numbers that are not finite become null."""
        return {
            "retained": or_null(self.retained),
            "standard_error": or_null(self.standard_error),
            "metrics": {
                name: measurement_to_json(metric) for name, metric in sorted(self.metrics.items())
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MemberQuality:
        """The inverse of `to_json`; null becomes NaN."""
        return cls(
            or_nan(data["retained"]),
            or_nan(data["standard_error"]),
            {name: measurement_from_json(m) for name, m in data["metrics"].items()},
        )


@dataclass(frozen=True, slots=True)
class BaseEntry:
    """The uncompressed model: bytes, quality on report tokens, resources."""

    storage_bytes: int
    quality: MemberQuality
    resources: Resources

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        return {
            "storage_bytes": self.storage_bytes,
            "quality": self.quality.to_json(),
            "resources": _resources_to_json(self.resources),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BaseEntry:
        """The inverse of `to_json`."""
        return cls(
            int(data["storage_bytes"]),
            MemberQuality.from_json(data["quality"]),
            _resources_from_json(data["resources"]),
        )


@dataclass(frozen=True, slots=True)
class Finalized:
    """How a member was rebuilt after the search, at the same bytes.

    Attributes:
        searched_as: id that it had.
        statistics: name, in the run's cache, of the layer statistics that it was rebuilt with,
            gathered block by block with all earlier blocks compressed.
        statistics_digest: of their content, and of the layers that were tuned over their block.
        changed: scheme that the search measured, of each layer whose scheme was replaced by one
            with a stronger method.
        search_damage: of the member as the search had it, on search tokens.
        rebuilt_damage: of the rebuilt member on the same tokens.
        difference: rebuilt minus searched, per sequence (summed over its tokens), paired.
        block_steps: of gradient descent on scales and rounding of each block; 0 if none was tuned.
        report_damages: of each sequence of the report tokens, summed over its tokens; empty in
            fronts of earlier versions.
    """

    searched_as: str
    statistics: str
    statistics_digest: str
    changed: Mapping[str, str]
    search_damage: Measurement
    rebuilt_damage: Measurement
    difference: Measurement
    block_steps: int = 0
    report_damages: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON object; numbers that are not finite become null."""
        return {
            "searched_as": self.searched_as,
            "statistics": self.statistics,
            "statistics_digest": self.statistics_digest,
            "changed": dict(sorted(self.changed.items())),
            "search_damage": measurement_to_json(self.search_damage),
            "rebuilt_damage": measurement_to_json(self.rebuilt_damage),
            "difference": measurement_to_json(self.difference),
            **({"block_steps": self.block_steps} if self.block_steps else {}),
            "report_damages": [or_null(damage) for damage in self.report_damages],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Finalized:
        """The inverse of `to_json`; null becomes NaN."""
        return cls(
            searched_as=str(data["searched_as"]),
            statistics=str(data["statistics"]),
            statistics_digest=str(data["statistics_digest"]),
            changed=dict(data["changed"]),
            search_damage=measurement_from_json(data["search_damage"]),
            rebuilt_damage=measurement_from_json(data["rebuilt_damage"]),
            difference=measurement_from_json(data["difference"]),
            block_steps=int(data.get("block_steps", 0)),
            report_damages=tuple(map(or_nan, data.get("report_damages", ()))),
        )


@dataclass(frozen=True, slots=True)
class Member:
    """One compressed model: a member of the front, or a baseline.

    Attributes:
        id: digest of the allocation, and of the statistics if the member was finalized.
        bits_per_weight: stored bits of the searched layers over their weights; scales, zero
            points and masks included.
        storage_bytes: bytes of the exported file's tensors.
        size_reduction: base bytes over `storage_bytes`.
        quality: measured on report tokens.
        resources: costs by name, each with unit and origin.
        cost_efficiency: 1 is the base model; NaN if it could not be computed.
        allocation: scheme text by layer name; absent layers are left as they are.
        name: of a baseline, e.g. ``uniform-4bit``; empty for what a sampler proposed.
        source: who proposed it; empty if unknown.
        is_knee: True for the knee of the front.
        finalized: how it was rebuilt after the search; None if it is as the search measured it.
    """

    id: str
    bits_per_weight: float
    storage_bytes: int
    size_reduction: float
    quality: MemberQuality
    resources: Resources
    cost_efficiency: float
    allocation: Mapping[str, str]
    name: str = ""
    source: str = ""
    is_knee: bool = False
    finalized: Finalized | None = None

    @property
    def latency_ms_per_token(self) -> float:
        """Time per token in milliseconds; NaN if it is not among the resources."""
        latency = self.resources.get(LATENCY)
        return math.nan if latency is None else latency.value

    def to_json(self) -> dict[str, Any]:
        """A JSON object; what is empty, false or None is left out."""
        optional = {"name": self.name, "source": self.source, "is_knee": self.is_knee}
        return {
            "id": self.id,
            **{key: value for key, value in optional.items() if value},
            "bits_per_weight": self.bits_per_weight,
            "storage_bytes": self.storage_bytes,
            "size_reduction": self.size_reduction,
            "quality": self.quality.to_json(),
            "resources": _resources_to_json(self.resources),
            "cost_efficiency": or_null(self.cost_efficiency),
            "allocation": dict(self.allocation),
            **({"finalized": self.finalized.to_json()} if self.finalized else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Member:
        """The inverse of `to_json`."""
        return cls(
            id=str(data["id"]),
            bits_per_weight=float(data["bits_per_weight"]),
            storage_bytes=int(data["storage_bytes"]),
            size_reduction=float(data["size_reduction"]),
            quality=MemberQuality.from_json(data["quality"]),
            resources=_resources_from_json(data["resources"]),
            cost_efficiency=or_nan(data["cost_efficiency"]),
            allocation=dict(data["allocation"]),
            name=str(data.get("name", "")),
            source=str(data.get("source", "")),
            is_knee=bool(data.get("is_knee", False)),
            finalized=Finalized.from_json(data["finalized"]) if "finalized" in data else None,
        )


@dataclass(frozen=True, slots=True)
class BudgetSpent:
    """What a study used: trials that ended, wall seconds until then, tokens evaluated."""

    trials: int
    seconds: float
    tokens: int


@dataclass(frozen=True, slots=True)
class StudySummary:
    """What was searched and with what.

    Attributes:
        model: as it was given.
        task: resolved name.
        space: name or file of the search space.
        sampler: name.
        seed: of splits and sampler.
        budget_spent: trials, seconds, tokens.
        details: further JSON values (data, tokens per split, dtypes, driver, device profile;
            ``cost_efficiency``, its definition; ``layer_bits``, for the heat map of the report).
    """

    model: str
    task: str
    space: str
    sampler: str
    seed: int
    budget_spent: BudgetSpent
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quality_floor(self) -> float | None:
        """Floor on retained quality that belongs to the cost efficiency of this study, if any."""
        definition = self.details.get("cost_efficiency")
        return None if definition is None else float(definition["min_retained"])

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        spent = self.budget_spent
        return {
            "model": self.model,
            "task": self.task,
            "space": self.space,
            "sampler": self.sampler,
            "seed": self.seed,
            "budget_spent": {
                "trials": spent.trials,
                "seconds": spent.seconds,
                "tokens": spent.tokens,
            },
            **self.details,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StudySummary:
        """The inverse of `to_json`; unknown keys become `details`."""
        spent = data["budget_spent"]
        fixed = {"model", "task", "space", "sampler", "seed", "budget_spent"}
        return cls(
            model=str(data["model"]),
            task=str(data["task"]),
            space=str(data["space"]),
            sampler=str(data["sampler"]),
            seed=int(data["seed"]),
            budget_spent=BudgetSpent(
                int(spent["trials"]), float(spent["seconds"]), int(spent["tokens"])
            ),
            details={key: value for key, value in data.items() if key not in fixed},
        )


@dataclass(frozen=True, slots=True)
class ReferencePoint:
    """Worst corner of the hypervolume's box.

    Attributes:
        quality_loss: 1 - retained quality; 1.0 is a model that retains nothing.
        relative: by the name of an optimized resource, its amount over that of the base model;
            1.0 is the base. In the order of the objectives.
    """

    quality_loss: float = 1.0
    relative: Mapping[str, float] = field(
        default_factory=lambda: dict.fromkeys(DEFAULT_OBJECTIVES.resources, 1.0)
    )

    @classmethod
    def of(cls, objectives: Objectives) -> ReferencePoint:
        """A model that retains nothing and takes as much as the base of each resource."""
        return cls(relative=dict.fromkeys(objectives.resources, 1.0))

    @property
    def coordinates(self) -> tuple[float, ...]:
        """Quality loss, then the relative resources."""
        return (self.quality_loss, *self.relative.values())

    def to_json(self) -> dict[str, float]:
        """A JSON object that names the coordinates, e.g. ``relative_storage_bytes``."""
        relative = {f"{_RELATIVE}{name}": value for name, value in self.relative.items()}
        return {"quality_loss": self.quality_loss, **relative}

    @classmethod
    def from_json(cls, data: Mapping[str, float]) -> ReferencePoint:
        """The inverse of `to_json`."""
        relative = {
            name.removeprefix(_RELATIVE): float(value)
            for name, value in data.items()
            if name.startswith(_RELATIVE)
        }
        return cls(float(data["quality_loss"]), relative)


def measurement_to_json(measurement: Measurement) -> dict[str, float | None]:
    """A JSON object; numbers that are not finite become null."""
    return {key: or_null(value) for key, value in measurement.to_json().items()}


def measurement_from_json(data: Mapping[str, float | None]) -> Measurement:
    """The inverse of `measurement_to_json`; null becomes NaN."""
    return Measurement(or_nan(data["value"]), or_nan(data["standard_error"]))


def _resources_to_json(resources: Resources) -> dict[str, Any]:
    return {
        name: {**resource.to_json(), "value": or_null(resource.value)}
        for name, resource in sorted(resources.items())
    }


def _resources_from_json(data: Mapping[str, Any]) -> dict[str, Resource]:
    return {
        name: Resource(or_nan(r["value"]), str(r["unit"]), str(r["origin"]))
        for name, r in data.items()
    }
