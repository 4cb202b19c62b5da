"""Ways to look at a trade-off: damage against one number that sums over choices.

With one resource there is one view. With several there is one of each, and one of all together:
the mean of the resources, each in units of the range that the space leaves it. Such a mixture sums
over choices like a resource, so all that works on a plane, predicted fronts and expected
improvements, works on it too, and its minima lie on the front over all resources (weighted sums of
objectives; ParEGO, Knowles, IEEE Transactions on Evolutionary Computation 10, 2006, draws them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from autocompress.search.guided.archive import Measured, MeasuredFront, Scale
from autocompress.search.guided.features import Levels, OptionFeatures
from autocompress.search.option_table import Floats, OptionTable

_DIGITS = 12
"""Of a total that count: sums of the same numbers in another order are equal."""


class View:
    """One cost of every option, and what was measured, by that cost.

    Attributes:
        by_choice: cost of each option, (n_choices, most options), infinity where there is none.
        fixed: cost of all that is not searched.
        largest: cost of the dearest levels.
        trials: told so far, in order.
        front: the non-dominated ones.
        rivals: the baselines.
    """

    def __init__(self, features: OptionFeatures, cost: Sequence[Floats], fixed: float) -> None:
        self._features = features
        self._flat = np.concatenate(cost)
        self.by_choice = features.by_choice(self._flat)
        self.fixed = fixed
        self.largest = fixed + sum(float(c.max()) for c in cost)
        magnitude = math.floor(math.log10(self.largest)) if self.largest > 0 else 0
        self._decimals = _DIGITS - 1 - magnitude
        self._order = np.argsort(self.by_choice, axis=1, kind="stable")
        self._ranks = np.argsort(self._order, axis=1, kind="stable")
        self.trials: list[Measured] = []
        self.front = MeasuredFront()
        self.rivals: list[Measured] = []

    def total(self, levels: Levels) -> Floats:
        """Total cost of levels (..., n_choices)."""
        total = self._flat[self._features.rows(levels)].sum(-1) + self.fixed
        rounded: Floats = np.round(total, self._decimals)
        return rounded

    def tell(self, measured: Measured) -> None:
        """Take a trial into account, at its cost in this view."""
        here = replace(measured, cost=float(self.total(measured.levels)))
        self.trials.append(here)
        self.front.add(here)
        if here.is_rival:
            self.rivals.append(here)

    def scale(self, n_used: int) -> Scale:
        """Which differences count, from the first trials."""
        used = self.trials[:n_used]
        return Scale.of([m for m in used if not m.extra_sd], self.largest)

    def ranks(self, levels: Levels) -> Levels:
        """Place of each level (..., n_choices) among those of its choice, cheapest first."""
        found: Levels = self._ranks[np.arange(len(self._ranks)), levels]
        return found

    def levels(self, ranks: Levels) -> Levels:
        """The inverse of `ranks`."""
        found: Levels = self._order[np.arange(len(self._order)), ranks]
        return found


def views(features: OptionFeatures, table: OptionTable, resources: Sequence[str]) -> list[View]:
    """One view of each resource, and of several the one of their mixture."""
    own = [View(features, table.cost(name), table.fixed[name]) for name in resources]
    if len(own) == 1:
        return own
    ranges = [sum(float(np.ptp(c)) for c in table.cost(name)) for name in resources]
    shares = [1.0 / extent if extent > 0 else 0.0 for extent in ranges]
    per_choice = zip(*(table.cost(name) for name in resources), strict=True)
    mixture = [
        sum((share * cost for share, cost in zip(shares, costs, strict=True)), np.zeros(()))
        for costs in per_choice
    ]
    fixed = sum(share * table.fixed[name] for share, name in zip(shares, resources, strict=True))
    return [*own, View(features, mixture, fixed)]
