"""`autocompress solve`: the best allocation for a new budget, from what a search has measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.core import LATENCY, STORAGE, Allocation
from autocompress.core.errors import UsageError
from autocompress.fronts import parse_bytes
from autocompress.search.guided.sampler import Guided
from autocompress.search.journal import JOURNAL_FILE, read_journal
from autocompress.search.solver import Levels, padded, solve, sweep
from autocompress.workflows.predictions import Predictions

_N_POINTS = 24


@dataclass(frozen=True, slots=True)
class Solution:
    """An allocation that was solved for, not measured.

    Attributes:
        allocation: the layers' schemes.
        damage: predicted, after correction by the search's trials, in the task's unit.
        low: damage that it exceeds with about 97.5 % probability, as the surrogate has it.
        high: damage that it stays below with as much.
        resources: totals by name, e.g. ``storage_bytes``.
    """

    allocation: Allocation
    damage: float
    low: float
    high: float
    resources: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "id": self.allocation.digest,
            "origin": "predicted, not measured",
            "damage": {"value": self.damage, "low": self.low, "high": self.high},
            "resources": self.resources,
            "allocation": self.allocation.to_json(),
        }


def solve_run(
    directory: str | Path,
    *,
    max_bytes: float | str | None = None,
    max_latency_ms: float | None = None,
) -> list[Solution]:
    """Solve for a budget with no forward pass; the Python twin of ``autocompress solve``.

    Predicted damages of single options are corrected by all trials of the journal (see
    `search.guided.surrogate`), then the allocation problem is solved anew.

    Args:
        directory: of a search.
        max_bytes: largest storage of the whole model, as a number or as in ``60MB``.
        max_latency_ms: longest time per token, as the search counted it; only one of the two may be
            given.

    Returns:
        One solution for a budget; without one, the predicted front over the main resource that
        the search optimized, cheapest first.

    Raises:
        UsageError: two budgets, one that cannot be read, or one that nothing fits.
        RunDirectoryError: the directory holds no predictions.
    """
    if max_bytes is not None and max_latency_ms is not None:
        raise UsageError(
            "One budget is solved at a time, but both --max-bytes and --max-latency-ms were given."
        )
    max_bytes = parse_bytes(max_bytes) if isinstance(max_bytes, str) else max_bytes
    solver = _Solver(Path(directory))
    if max_bytes is not None:
        return solver.within(STORAGE, max_bytes)
    if max_latency_ms is not None:
        return solver.within(LATENCY, max_latency_ms)
    return solver.front()


class _Solver:
    def __init__(self, directory: Path) -> None:
        self._predictions = Predictions.read(directory)
        space, table = self._predictions.space, self._predictions.table
        sampler = Guided(space, seed=0, table=table, objectives=self._predictions.objectives)
        for result in read_journal(directory / JOURNAL_FILE).results:
            sampler.tell(result)
        self._surrogate = sampler.surrogate
        self._damages = self._surrogate.damages()

    def within(self, resource: str, limit: float) -> list[Solution]:
        """The solution for a limit on one resource."""
        table = self._predictions.table
        searched = limit - table.fixed[resource]
        least = table.fixed[resource] + sum(float(c.min()) for c in table.cost(resource))
        if not limit >= least:
            got = f"{limit:,.0f}" if resource == STORAGE else f"{limit:.6g}"
            raise UsageError(
                f"The least that the space {self._predictions.space.name!r} can take is "
                f"{_amount(resource, least)}, but the limit is {got}. Next "
                "step: give at least that, or search a space with smaller options."
            )
        levels = solve(self._damages, padded(table.cost(resource)), searched)
        return self._solutions([levels])

    def front(self) -> list[Solution]:
        """Points of the predicted front over the main resource, evenly spaced."""
        main = self._predictions.objectives.main
        points = sweep(self._damages, padded(self._predictions.table.cost(main)))
        wanted = np.linspace(points.costs[0], points.costs[-1], _N_POINTS)
        found = np.unique(np.searchsorted(points.costs, wanted, side="right") - 1)
        return self._solutions([points.at(int(point)) for point in found])

    def _solutions(self, candidates: Sequence[Levels]) -> list[Solution]:
        space, table = self._predictions.space, self._predictions.table
        mean, sd = self._surrogate.predict(np.stack(candidates))
        names = [choice.name for choice in space.choices]
        return [
            Solution(
                allocation=space.decode(dict(zip(names, map(int, levels), strict=True))),
                damage=float(np.exp(m)),
                low=float(np.exp(m - 2 * s)),
                high=float(np.exp(m + 2 * s)),
                resources={name: table.total(name, levels.tolist()) for name in table.costs},
            )
            for levels, m, s in zip(candidates, mean, sd, strict=True)
        ]


def _amount(resource: str, value: float) -> str:
    """A limit in its unit; rounded up, so that what is read off is enough."""
    if resource == STORAGE:
        return f"{math.ceil(value):,} bytes"
    step = 10.0 ** (math.floor(math.log10(value)) - 5) if value > 0 else 1.0
    return f"{math.ceil(value / step) * step:.6g} ms per token"
