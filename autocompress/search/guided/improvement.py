"""Expected hypervolume improvement where one objective is certain and the other Gaussian.

Bytes are known before a trial runs; only the damage is not. The hypervolume that a candidate adds
is then an integral over bytes of a one-dimensional expected improvement, a finite sum over the
steps of the front (the two-objective case of Yang et al., Journal of Global Optimization 75, 2019,
with one variance of zero).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from autocompress.search.option_table import Floats


@dataclass(frozen=True, eq=False)
class Staircase:
    """What is reached so far.

    Attributes:
        costs: of the front's members, ascending, (n,).
        losses: best loss at no more cost, strictly descending, (n,).
        reference: (cost, loss) up to which an improvement counts.
    """

    costs: Floats
    losses: Floats
    reference: tuple[float, float]

    @classmethod
    def of(cls, costs: Floats, losses: Floats, reference: tuple[float, float]) -> Staircase:
        """The non-dominated part of points (n,), (n,) inside the reference."""
        kept: list[tuple[float, float]] = []
        lowest = reference[1]
        for index in np.lexsort((losses, costs)):
            if costs[index] < reference[0] and losses[index] < lowest:
                lowest = float(losses[index])
                kept.append((float(costs[index]), lowest))
        table = np.array(kept).reshape(-1, 2)
        return cls(table[:, 0], table[:, 1], reference)

    @property
    def hypervolume(self) -> float:
        """Area that the front dominates inside the reference."""
        widths = np.diff(np.append(self.costs, self.reference[0]))
        return float((widths * (self.reference[1] - self.losses)).sum())

    def expected_improvement(self, costs: Floats, means: Floats, sds: Floats) -> Floats:
        """Expected gain of hypervolume by each candidate, (m,).

        Args:
            costs: of the candidates, (m,).
            means: of their loss, (m,).
            sds: of their loss, positive, (m,).
        """
        # From each step to the next the best loss is constant; before the first it is the
        # reference's.
        starts = np.concatenate(([-np.inf], self.costs))
        ends = np.append(self.costs, self.reference[0])
        best = np.concatenate(([self.reference[1]], self.losses))
        widths = np.clip(ends[None] - np.maximum(starts[None], costs[:, None]), 0.0, None)
        gains = _expected_gain(best[None] - means[:, None], sds[:, None])
        total: Floats = (widths * gains).sum(1)
        return total

    def expected_improvement_at(
        self, cost: float, costs: Floats, means: Floats, sds: Floats
    ) -> Floats:
        """Expected gain of the best loss at no more than `cost`; arguments as above, (m,)."""
        place = int(np.searchsorted(self.costs, cost, side="right"))
        best = float(self.losses[place - 1]) if place else self.reference[1]
        gains: Floats = np.where(costs <= cost, _expected_gain(best - means, sds), 0.0)
        return gains


def _expected_gain(gap: Floats, sd: Floats) -> Floats:
    """``E[max(gap + sd z, 0)]`` of a standard normal z."""
    z = gap / sd
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    gain: Floats = gap * ndtr(z) + sd * density
    return gain
