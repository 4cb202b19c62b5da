"""What a training pass leaves: a distribution over the options of each choice, per trade-off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autocompress.search.solver import sweep

if TYPE_CHECKING:
    from autocompress.search.option_table import PerChoice

N_TRADE_OFFS = 6
_TEMPERATURE = 0.5
_WIDEST = 1e3
"""Ratio of the largest to the least cost that trade-offs are spread over, if the least is 0."""


@dataclass(frozen=True, eq=False)
class Preference:
    """The distributions that one trade-off weight leads to.

    Attributes:
        weight: damage that a byte (or what else is saved) is worth, not negative.
        log_probabilities: of the options of each choice; -inf for one that is never taken.
    """

    weight: float
    log_probabilities: PerChoice

    @property
    def best(self) -> tuple[int, ...]:
        """The most likely level of each choice, the cheapest of equals."""
        return tuple(int(row.argmax()) for row in self.log_probabilities)

    def draw(self, generator: np.random.Generator) -> tuple[int, ...]:
        """Levels drawn from the distributions."""
        return tuple(
            int((row + generator.gumbel(size=len(row))).argmax()) for row in self.log_probabilities
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value; -inf becomes null."""
        rows = [[float(v) if np.isfinite(v) else None for v in r] for r in self.log_probabilities]
        return {"weight": self.weight, "log_probabilities": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preference:
        """The inverse of `to_json`."""
        rows = data["log_probabilities"]
        values = tuple(np.array([-np.inf if v is None else float(v) for v in row]) for row in rows)
        return cls(float(data["weight"]), values)


def trade_offs(damage: PerChoice, cost: PerChoice, count: int = N_TRADE_OFFS) -> tuple[float, ...]:
    """Damage that a byte saves on the predicted front, at sizes of equal ratios; or another cost.

    Damages fall exponentially with bits, so no fixed list of weights suits a model; these lead to
    sizes all over the range, as far as predictions hold. Dearest size first, each weight once; 0
    alone for a space without freedom.
    """
    points = sweep(damage, cost)
    if len(points) < 2:
        return (0.0,)
    least = points.costs[0] or min(1.0, points.costs[-1] / _WIDEST)
    sizes = np.geomspace(least, points.costs[-1], count + 2)[-2:0:-1]
    at = np.clip(np.searchsorted(points.costs, sizes) - 1, 0, len(points) - 2)
    slopes = (points.damages[at] - points.damages[at + 1]) / np.diff(points.costs)[at]
    return tuple(dict.fromkeys(map(float, slopes)))


def from_predictions(
    damage: PerChoice, cost: PerChoice, weights: Sequence[float] | None = None
) -> tuple[Preference, ...]:
    """What damages that add up would lead to: ``log p = -(damage + weight * bytes) / T``.

    T is half of the typical excess of an option over the best one of its choice.
    """
    weights = trade_offs(damage, cost) if weights is None else weights
    found = []
    for weight in weights:
        excess = [d + weight * c for d, c in zip(damage, cost, strict=True)]
        excess = [row - row.min() for row in excess]
        flat: NDArray[np.float64] = np.concatenate(excess)
        typical = float(np.median(flat[flat > 0])) if (flat > 0).any() else 1.0
        logits = (-row / (_TEMPERATURE * typical) for row in excess)
        found.append(Preference(weight, tuple(_normalised(row) for row in logits)))
    return tuple(found)


def _normalised(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max()
    normalised: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return normalised
