"""AutoScheme-like: predicted damages and dynamic programming under a byte budget.

Intel AutoRound's AutoScheme scores each layer and scheme by ``sum |G * dW|`` and adds up layer by
layer, keeping for every size the least sum. The score is the option table's damage: pass a table of
the ``gradient`` score (`autocompress.search.peers.scores`) for the peer's own criterion. AutoScheme
prunes states to a beam; here sizes are rounded to a fine grid instead, which keeps all of them.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autocompress.search.peers.base import BudgetSweep, Levels
from autocompress.search.sampler import SAMPLERS

_UNITS = 4000


@SAMPLERS.register("gradient-dp")
class GradientDp(BudgetSweep):
    """Least predicted damage at each budget, by dynamic programming."""

    name = "gradient-dp"
    summary = "peer: predicted damages and dynamic programming under a byte budget (AutoScheme)"

    def solve(self, budget: float) -> Levels:
        """See `BudgetSweep.solve`."""
        decisions, extra, unit = self._program
        left = int(np.floor((budget - sum(float(c.min()) for c in self.costs)) / unit))
        levels = [0] * len(decisions)
        for choice in reversed(range(len(decisions))):
            levels[choice] = int(decisions[choice][left])
            left -= int(extra[choice][levels[choice]])
        return tuple(levels)

    @cached_property
    def _program(self) -> tuple[list[NDArray[np.int16]], list[NDArray[np.int64]], float]:
        """Best level of each choice at each size of it and all before it; added units; the unit.

        Sizes are rounded up, so that no budget is ever exceeded.
        """
        span = sum(float(np.ptp(c)) for c in self.costs)
        unit = span / _UNITS or 1.0
        extra = [np.ceil((c - c.min()) / unit - 1e-9).astype(np.int64) for c in self.costs]
        best = np.zeros(_UNITS + 1)
        decisions = []
        for damage, added in zip(self.damage, extra, strict=True):
            candidates = np.full((len(damage), _UNITS + 1), np.inf)
            for level, units in enumerate(added):
                candidates[level, units:] = best[: _UNITS + 1 - units] + damage[level]
            decisions.append(candidates.argmin(0).astype(np.int16))
            best = candidates.min(0)
        return decisions, extra, unit
