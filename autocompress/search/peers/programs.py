"""One option per choice as a linear program, for the peers that hand it to a solver."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from autocompress.search.option_table import PerChoice

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class AssignmentProgram:
    """Minimise ``damage . x`` with one x of each choice equal to 1 and ``cost . x`` bounded.

    Both rows are scaled to a largest entry of 1: damages of 1e-6 and sizes of 1e9 are beyond the
    tolerances of solvers.

    Attributes:
        damage: (F,) of all options, choice after choice.
        cost: (1, F).
        one_each: (n_choices, F) of 0 and 1.
        cost_scale: what a budget is divided by.
    """

    damage: Floats
    cost: Floats
    one_each: csr_array
    cost_scale: float

    @classmethod
    def of(cls, damage: PerChoice, cost: PerChoice) -> AssignmentProgram:
        """From one array per choice each."""
        flat_damage, flat_cost = np.concatenate(damage), np.concatenate(cost)
        rows = np.repeat(np.arange(len(damage)), [len(d) for d in damage])
        columns = np.arange(len(rows))
        one_each = csr_array((np.ones(len(rows)), (rows, columns)))
        scale = float(flat_cost.max()) or 1.0
        largest = float(flat_damage.max()) or 1.0
        return cls(flat_damage / largest, flat_cost[None] / scale, one_each, scale)
