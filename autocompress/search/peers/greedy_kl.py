"""Single-site damages, measured, and greedy allocation: as exllamav3 and Thireus' suites do.

First every option of every choice is measured alone, all other choices at their mildest option; the
mildest model itself is the reference. Then, from the cheapest model up, the step with the most
measured damage saved per byte is taken again and again: each state on that path is a proposal.
Where damages are not monotone, a step may jump over levels. Nothing is allocated before every probe
was asked for: below that many trials this peer has no front but its probes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np

from autocompress.search.option_table import Floats
from autocompress.search.peers.base import BatchSampler, Levels, Measured, spread_budgets
from autocompress.search.sampler import SAMPLERS

_UNKNOWN = 1e9  # of a probe that failed: no step leads there


@SAMPLERS.register("greedy-kl")
class GreedyKl(BatchSampler):
    """Probes each option alone, then walks by damage saved per byte."""

    name = "greedy-kl"
    summary = "peer: measures each option alone, then greedy by damage per byte (exl3, Thireus)"

    _walked: tuple[tuple[float, ...], list[Levels]] = ((), [])

    def _batch(self, first: int, known: Sequence[Measured]) -> Iterator[Levels]:
        """Probes while any is missing, then the greedy path, coarse to fine."""
        yield from (p for p in self._probes() if self._seen.get(p, first) >= first)
        damage = self._alone(known)
        key = tuple(float(value) for values in damage for value in values)
        if self._walked[0] != key:
            self._walked = (key, list(self._path(damage)))
        yield from self._walked[1]

    def _probes(self) -> Iterator[Levels]:
        """The mildest model, then all of its single changes."""
        mildest = tuple(int(cost.argmax()) for cost in self.costs)
        yield mildest
        for choice, n_levels in enumerate(self.n_levels):
            for level in range(n_levels):
                yield (*mildest[:choice], level, *mildest[choice + 1 :])

    def _alone(self, known: Sequence[Measured]) -> list[Floats]:
        """Measured damage of each option alone, beyond the mildest model's, per choice."""
        by_levels = {entry.levels: entry.damage for entry in known}
        probes = self._probes()
        reference = by_levels.get(next(probes), 0.0)
        damages = [by_levels.get(probe, _UNKNOWN) - reference for probe in probes]
        return np.split(np.array(damages), np.cumsum(self.n_levels)[:-1])

    def _path(self, damage: Sequence[Floats]) -> Iterator[Levels]:
        """States of the greedy walk nearest below each budget."""
        levels = [int(cost.argmin()) for cost in self.costs]
        states, sizes = [tuple(levels)], [self.cost_of(levels)]
        steps = [_step(d, c, v) for d, c, v in zip(damage, self.costs, levels, strict=True)]
        queue = [(-step[0], i, step[1]) for i, step in enumerate(steps) if step]
        heapq.heapify(queue)
        while queue:
            _, choice, level = heapq.heappop(queue)
            levels[choice] = level
            states.append(tuple(levels))
            sizes.append(self.cost_of(levels))
            step = _step(damage[choice], self.costs[choice], level)
            if step:
                heapq.heappush(queue, (-step[0], choice, step[1]))
        for budget in spread_budgets(self.costs, 4 * len(states)):
            yield states[max(0, int(np.searchsorted(sizes, budget, side="right")) - 1)]


def _step(damage: Floats, cost: Floats, level: int) -> tuple[float, int] | None:
    """(damage saved per byte, level) of a choice's best step up; None if nothing is dearer."""
    added, saved = cost - cost[level], damage[level] - damage
    dearer = np.flatnonzero(added > 0)
    if not len(dearer):
        return None
    rates = saved[dearer] / added[dearer]
    best = int(rates.argmax())
    return float(rates[best]), int(dearer[best])
