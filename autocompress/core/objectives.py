"""What a study optimizes: quality, and the resources that it is traded for.

The one place where the direction of an objective is decided: all losses are minimised. Every place
that compares models by cost asks here which costs count: samplers, racing, fronts, comparisons with
baselines, pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from autocompress.core.errors import UsageError, nearest
from autocompress.core.metrics import Metrics, Resources

QUALITY = "quality"
DAMAGE = "damage"
STORAGE = "storage_bytes"
LATENCY = "latency_ms_per_token"

RESOURCE_NAMES = {
    "bytes": STORAGE,
    "latency": LATENCY,
    "bytes_moved": "bytes_moved_per_token",
    "macs": "macs_per_token",
}
"""Resources that sum over layers, so that a search can trade them layer by layer."""

_DIGITS = 12


class Costed(Protocol):
    """Anything that takes resources: metrics of a trial, a member, the base model."""

    @property
    def storage_bytes(self) -> int:
        """Bytes of the tensors."""
        ...

    @property
    def resources(self) -> Resources:
        """All costs by name."""
        ...


@dataclass(frozen=True, slots=True)
class Objectives:
    """Quality, and the resources that a study trades it for.

    Attributes:
        resources: at least one, each once; the first is the main one: axis of pictures, order of
            tables, meaning of aims.
    """

    resources: tuple[str, ...] = (STORAGE,)

    def __post_init__(self) -> None:
        for name in self.resources:
            if name not in RESOURCE_NAMES.values():
                raise UsageError(
                    f"A search optimizes resources that sum over layers, but got {name!r}. "
                    f"{nearest(name, RESOURCE_NAMES.values())}"
                )
        if not self.resources or len(set(self.resources)) < len(self.resources):
            raise UsageError(
                "A search optimizes quality and at least one resource, each named once, but got "
                f"{self.text!r}. Example: --optimize quality,bytes."
            )

    @classmethod
    def parse(cls, text: str) -> Objectives:
        """Read ``quality,bytes``; the order of the resources counts, the place of quality not.

        Raises:
            UsageError: quality is missing, a resource is unknown or occurs twice, or there is none.
        """
        words = [word.strip() for word in text.split(",")]
        known = [QUALITY, *RESOURCE_NAMES]
        for word in words:
            if word not in known:
                raise UsageError(f"--optimize knows no {word!r}. {nearest(word, known)}")
        if words.count(QUALITY) != 1:
            raise UsageError(
                f"--optimize names quality once, beside what it is traded for, but got {text!r}. "
                f"Next step: --optimize {','.join([QUALITY, *_without_quality(words)])}."
            )
        return cls(tuple(RESOURCE_NAMES[word] for word in _without_quality(words)))

    @property
    def text(self) -> str:
        """What `parse` reads back: ``quality,bytes``."""
        return ",".join([QUALITY, *map(short_name, self.resources)])

    @property
    def names(self) -> tuple[str, ...]:
        """What is minimised, in the order of `losses`: ``damage``, then the resources."""
        return (DAMAGE, *self.resources)

    @property
    def main(self) -> str:
        """The first resource."""
        return self.resources[0]

    @property
    def words(self) -> str:
        """The resources for people: ``bytes``, ``bytes and latency``."""
        shown = [short_name(name).replace("_", " ") for name in self.resources]
        return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))

    def costs(self, costed: Costed) -> tuple[float, ...]:
        """The resources of a model in order; NaN for one that it does not state."""
        return tuple(cost_of(costed, name) for name in self.resources)

    def losses(self, metrics: Metrics) -> tuple[float, ...]:
        """Losses of a measured model in the order of `names`; NaN where the measurement is."""
        return (metrics.quality.damage.value, *self.costs(metrics))


DEFAULT_OBJECTIVES = Objectives()


def short_name(resource: str) -> str:
    """What `--optimize` calls a resource."""
    return next(short for short, name in RESOURCE_NAMES.items() if name == resource)


def cost_of(costed: Costed, resource: str) -> float:
    """One resource of a model, see `comparable`; NaN if it is not stated."""
    if resource == STORAGE:
        return float(costed.storage_bytes)
    found = costed.resources.get(resource)
    return math.nan if found is None else comparable(found.value)


def takes_no_more(costs: Sequence[float], limits: Sequence[float]) -> bool:
    """Whether no cost is above its limit; both in the order of the resources."""
    return all(own <= most for own, most in zip(costs, limits, strict=True))


def comparable(cost: float) -> float:
    """A cost to twelve significant digits, so that equal sums are equal.

    Two layers of one shape that swap their schemes take equally long, but floating-point sums of
    the same times in two orders differ in the last bits: no reason to prefer one of them.
    """
    return float(f"{cost:.{_DIGITS}g}") if math.isfinite(cost) and cost % 1 else cost


def _without_quality(words: list[str]) -> list[str]:
    return [word for word in words if word != QUALITY]
