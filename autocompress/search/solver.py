"""Allocation under a budget: one option per choice, least total damage at a total cost.

The multiple-choice knapsack problem. `sweep` gives every supported point of the trade-off at once
(Lagrangian relaxation; Sinha and Zoltners, The Multiple-Choice Knapsack Problem, Operations
Research 27, 1979): the lower convex hull of each choice's (cost, damage) points is cut into edges,
and taking all edges of all choices by damage saved per unit of cost is optimal after every edge.
`solve` fills what is left of one budget by local search; `solve_exactly` is dynamic programming, an
oracle for small problems.

Costs and damages are given as one array per choice; a level is an index into it. No forward pass,
no model: numbers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocompress.core.errors import UsageError

Floats = NDArray[np.float64]
Levels = NDArray[np.int64]
Options = Sequence[Floats] | Floats
"""A value of every level: one array per choice, or a matrix (n_choices, most options)."""

_LARGEST_EXACT = 50_000_000  # cells of the dynamic program's table of decisions
_MOST_MOVES_PAIRED = 600
_MOST_REPAIRS = 200


@dataclass(frozen=True, eq=False)
class Sweep:
    """All supported points, cheapest first; neighbours differ in one choice.

    Attributes:
        start: levels of the cheapest point, (n_choices,).
        choices: the choice that changes from point k to point k + 1, (n_points - 1,).
        levels: its new level.
        costs: total cost of each point, (n_points,), ascending.
        damages: total damage of each point, descending.
    """

    start: Levels
    choices: Levels
    levels: Levels
    costs: Floats
    damages: Floats

    def __len__(self) -> int:
        return len(self.costs)

    def at(self, point: int) -> Levels:
        """Levels of a point, (n_choices,)."""
        found = self.start.copy()
        # Edges of one choice come in the order of its levels, so the last one written is right.
        found[self.choices[:point]] = self.levels[:point]
        return found

    def within(self, max_cost: float) -> int | None:
        """The last point that costs no more; None if even the first does."""
        point = int(np.searchsorted(self.costs, max_cost, side="right")) - 1
        return point if point >= 0 else None


def sweep(damage: Options, cost: Options) -> Sweep:
    """Every supported point of the trade-off between total cost and total damage.

    Args:
        damage: of each level: one array per choice, or a matrix (n_choices, most options) with
            infinity where there is no option.
        cost: likewise.
    """
    d, c = _matrix(damage), _matrix(cost)
    rows = np.arange(len(d))
    start = here = np.lexsort((d, c), axis=1)[:, 0]
    steps: list[tuple[Levels, Levels, Floats, Floats]] = []
    # Every hull is walked at once: from each choice's point to the one that saves the most damage
    # per cost, the dearest of those that save equally.
    while True:
        added, saved = c - c[rows, here][:, None], d[rows, here][:, None] - d
        with np.errstate(invalid="ignore", divide="ignore"):
            slope = np.where((saved > 0) & (added > 0) & np.isfinite(c), saved / added, 0.0)
        steepest = slope.max(axis=1, initial=0.0)
        moving = np.flatnonzero(steepest > 0)
        if not len(moving):
            break
        tied = slope[moving] == steepest[moving][:, None]
        level = np.where(tied, c[moving], -np.inf).argmax(axis=1)
        steps.append((moving, level, added[moving, level], saved[moving, level]))
        here = here.copy()
        here[moving] = level
    choices, levels, added, saved = _joined(steps)
    # Slopes fall along each hull; a stable sort keeps the order where rounding makes them equal.
    order = np.argsort(-saved / added, kind="stable")
    return Sweep(
        start=start,
        choices=choices[order],
        levels=levels[order],
        costs=c[rows, start].sum() + np.concatenate(([0.0], np.cumsum(added[order]))),
        damages=d[rows, start].sum() - np.concatenate(([0.0], np.cumsum(saved[order]))),
    )


def _joined(
    steps: Sequence[tuple[Levels, Levels, Floats, Floats]],
) -> tuple[Levels, Levels, Floats, Floats]:
    if not steps:
        nothing = np.empty(0, dtype=np.int64)
        return nothing, nothing, np.empty(0), np.empty(0)
    choices, levels, added, saved = zip(*steps, strict=True)
    return (
        np.concatenate(choices),
        np.concatenate(levels),
        np.concatenate(added),
        np.concatenate(saved),
    )


def _matrix(values: Options) -> Floats:
    return values if isinstance(values, np.ndarray) else padded(values)


def solve(damage: Options, cost: Options, max_cost: float) -> Levels:
    """Levels of little damage at no more than `max_cost`.

    The supported point below the budget, then local search: single changes, and pairs of one
    cheaper and one dearer change, as long as they help.

    Returns:
        Levels, (n_choices,).

    Raises:
        UsageError: even the cheapest levels cost more; says how much.
    """
    points = sweep(damage, cost)
    point = points.within(max_cost)
    if point is None:
        raise UsageError(
            f"The least that these choices can cost is {points.costs[0]:,.0f}, but the limit is "
            f"{max_cost:,.0f}. Next step: give at least that, or a space with smaller options."
        )
    return _Repair(damage, cost, points.at(point), max_cost).run()


class _Repair:
    """Local search from a feasible point over single changes and pairs of them."""

    def __init__(self, damage: Options, cost: Options, levels: Levels, max_cost: float) -> None:
        self._damage, self._cost = _matrix(damage), _matrix(cost)
        self._rows = np.arange(len(levels))
        self._levels = levels.copy()
        self._max_cost = max_cost

    def run(self) -> Levels:
        """Levels that no move improves."""
        for _ in range(_MOST_REPAIRS):
            moves = self._improvement()
            if not moves:
                break
            for choice, level in moves:
                self._levels[choice] = level
        return self._levels

    def _improvement(self) -> list[tuple[int, int]]:
        """(choice, new level) of the best single change or pair that fits; empty if none helps."""
        here_damage = self._damage[self._rows, self._levels]
        here_cost = self._cost[self._rows, self._levels]
        slack = self._max_cost - float(here_cost.sum())
        width = self._damage.shape[1]
        saved = (here_damage[:, None] - self._damage).ravel()
        added = (self._cost - here_cost[:, None]).ravel()
        least = 1e-12 * float(here_damage.sum())
        single = np.where(added <= slack, saved, -np.inf)
        best = int(single.argmax())
        if single[best] > least:
            return [divmod(best, width)]
        dearer = _first(np.flatnonzero(saved > least), -saved)
        cheaper = np.flatnonzero(added < 0)
        cheaper = _first(cheaper, saved / np.where(added < 0, added, 1.0))
        if not len(dearer) or not len(cheaper):
            return []
        gain = saved[dearer][:, None] + saved[cheaper][None]
        allowed = added[dearer][:, None] + added[cheaper][None] <= slack
        allowed &= dearer[:, None] // width != cheaper[None] // width
        gain = np.where(allowed, gain, -np.inf)
        i, j = divmod(int(gain.argmax()), len(cheaper))
        if gain[i, j] <= least:
            return []
        return [divmod(int(dearer[i]), width), divmod(int(cheaper[j]), width)]


def _first(indices: NDArray[np.int64], keys: Floats) -> NDArray[np.int64]:
    """The indices of the smallest keys, few enough to be paired."""
    return indices[np.argsort(keys[indices], kind="stable")][:_MOST_MOVES_PAIRED]


def padded(arrays: Sequence[Floats]) -> Floats:
    """Ragged per-choice arrays as one matrix (n_choices, most options); infinity where none is."""
    matrix = np.full((len(arrays), max(map(len, arrays), default=0)), np.inf)
    for row, array in zip(matrix, arrays, strict=True):
        row[: len(array)] = array
    return matrix


def solve_exactly(
    damage: Sequence[Floats], cost: Sequence[NDArray[np.int64]], max_cost: int
) -> Levels:
    """Levels of least damage at no more than `max_cost`, by dynamic programming over the cost.

    Args:
        damage: of each level, one array per choice.
        cost: integers; divide by their greatest common divisor first.
        max_cost: the budget in the same unit.

    Raises:
        UsageError: the table of decisions would be too large, or nothing fits.
    """
    least = [int(c.min()) for c in cost]
    budget = int(max_cost) - sum(least)
    if budget < 0:
        raise UsageError(
            f"The least that these choices can cost is {sum(least):,}, but the limit is "
            f"{max_cost:,}."
        )
    if (budget + 1) * len(cost) > _LARGEST_EXACT:
        raise UsageError(
            f"Dynamic programming over {budget:,} units of cost and {len(cost)} choices needs too "
            "much memory. Next step: round the costs to a coarser unit, or use `solve`."
        )
    best = np.zeros(budget + 1)
    decisions = np.zeros((len(cost), budget + 1), dtype=np.int16)
    for choice, (d, c) in enumerate(zip(damage, cost, strict=True)):
        candidates = np.full((len(d), budget + 1), np.inf)
        for level, extra in enumerate(np.asarray(c, dtype=np.int64) - least[choice]):
            if extra <= budget:
                candidates[level, extra:] = best[: budget + 1 - extra] + d[level]
        decisions[choice] = candidates.argmin(0)
        best = candidates.min(0)
    levels = np.empty(len(cost), dtype=np.int64)
    left = int(best.argmin())
    for choice in reversed(range(len(cost))):
        levels[choice] = decisions[choice, left]
        left -= int(cost[choice][levels[choice]]) - least[choice]
    return levels
