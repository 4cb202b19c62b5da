"""HAWQ-like: Hessian-trace perturbations and an integer linear program.

HAWQ-V2 (Dong et al. 2020, arXiv 1911.03852) ranks by the mean Hessian trace times the squared error
of the weight; HAWQ-V3 (Yao et al. 2021, arXiv 2011.10680) minimises its sum under a size limit by
integer linear programming. The perturbation is the option table's damage: pass a table of the
``trace`` score (`autocompress.search.peers.scores`), the Gauss-Newton trace instead of Hutchinson's
estimate of the Hessian's, for the peer's own criterion.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from autocompress.search.peers.base import BudgetSweep, Levels
from autocompress.search.sampler import SAMPLERS

if TYPE_CHECKING:
    from autocompress.search.peers.programs import AssignmentProgram

_GAP = 1e-3
_MOST_NODES = 200  # a limit in seconds would make proposals depend on the clock


@SAMPLERS.register("hawq")
class Hawq(BudgetSweep):
    """Least summed perturbation at each budget, by integer programming."""

    name = "hawq"
    summary = "peer: Hessian-trace perturbations and integer programming (HAWQ-V3)"

    def solve(self, budget: float) -> Levels:
        """See `BudgetSweep.solve`."""
        from scipy.optimize import LinearConstraint, milp

        program = self._program
        found = milp(
            program.damage,
            integrality=np.ones(len(program.damage)),
            bounds=(0.0, 1.0),
            constraints=[
                LinearConstraint(program.cost, ub=budget / program.cost_scale),
                LinearConstraint(program.one_each, lb=1.0, ub=1.0),
            ],
            # HiGHS 1.12 prints to stdout from within its presolve.
            options={"mip_rel_gap": _GAP, "node_limit": _MOST_NODES, "presolve": False},
        )
        if found.x is None:  # no whole solution within the limit on nodes
            return tuple(int(cost.argmin()) for cost in self.costs)
        shares = np.split(found.x, np.cumsum(self.n_levels)[:-1])
        return tuple(int(share.argmax()) for share in shares)

    @cached_property
    def _program(self) -> AssignmentProgram:
        from autocompress.search.peers.programs import AssignmentProgram

        return AssignmentProgram.of(self.damage, self.costs)
