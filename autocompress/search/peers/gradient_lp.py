"""AutoQuantize-like: predicted damages and a linear program.

NVIDIA Model Optimizer's AutoQuantize scores each layer and format by ``sum (g * dy)^2`` and solves
a linear program over which format each layer takes. The score is the option table's damage: pass a
table of the ``fisher`` score (`autocompress.search.peers.scores`) for the peer's own criterion. Of
a relaxed solution at most one choice is split between two options; it takes the smaller one.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from autocompress.search.peers.base import BudgetSweep, Levels
from autocompress.search.sampler import SAMPLERS

if TYPE_CHECKING:
    from autocompress.search.peers.programs import AssignmentProgram

_IS_USED = 1e-6


@SAMPLERS.register("gradient-lp")
class GradientLp(BudgetSweep):
    """Least predicted damage at each budget, by linear programming."""

    name = "gradient-lp"
    summary = "peer: predicted damages and a linear program under a byte budget (AutoQuantize)"

    def solve(self, budget: float) -> Levels:
        """See `BudgetSweep.solve`."""
        from scipy.optimize import linprog

        program = self._program
        found = linprog(
            program.damage,
            A_ub=program.cost,
            b_ub=[budget / program.cost_scale],
            A_eq=program.one_each,
            b_eq=np.ones(len(self.costs)),
            bounds=(0.0, 1.0),
        )
        shares = np.split(found.x, np.cumsum(self.n_levels)[:-1])
        return tuple(
            min(np.flatnonzero(share > _IS_USED).tolist(), key=cost.__getitem__)
            for share, cost in zip(shares, self.costs, strict=True)
        )

    @cached_property
    def _program(self) -> AssignmentProgram:
        from autocompress.search.peers.programs import AssignmentProgram

        return AssignmentProgram.of(self.damage, self.costs)
