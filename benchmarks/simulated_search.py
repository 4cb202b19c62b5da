"""The quality of a search without a model: an additive objective, samplers that learn from it.

What a proposal may know depends on how many trials are in flight; `search_gaps` counts the cost.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

LEVEL_BITS = (2.0, 3.0, 4.0, 6.0, 8.0)
CORNER = (0.0, 8.0)  # reference point of the hypervolume: the damage of 2 bits, the size of 8

Levels = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Objective:
    """A synthetic additive objective: damage and bits of each choice at each level.

    Attributes:
        damage: shape ``(choices, levels)``, convex in `bits`.
        bits: of each level, ascending.
        share: of the weights that belong to each choice.
    """

    damage: Floats
    bits: Floats
    share: Floats

    @classmethod
    def draw(cls, n_choices: int, seed: int) -> Objective:
        """Damage falls fourfold per bit; sensitivities are log-normal over two decades."""
        random = np.random.default_rng([seed, 3])
        bits = np.array(LEVEL_BITS)
        share = random.lognormal(0, 0.5, n_choices)
        damage = random.lognormal(0, 1.5, n_choices)[:, None] * 4.0**-bits
        return cls(damage / damage[:, 0].sum(), bits, share / share.sum())

    def point(self, levels: Levels) -> tuple[float, float]:
        """(log10 of the damage over that of the lowest level, mean bits per weight)."""
        damage = self.damage[np.arange(len(levels)), levels].sum()
        return math.log10(damage), float(self.bits[levels] @ self.share)

    def supported_front(self) -> list[tuple[float, float]]:
        """The best that is possible: steps in the order of damage saved per bit."""
        slopes = -np.diff(self.damage, axis=1) / (np.diff(self.bits) * self.share[:, None])
        levels = np.zeros(len(self.damage), dtype=np.int64)
        found = [self.point(levels)]
        for step in np.argsort(-slopes, axis=None):
            levels[step // slopes.shape[1]] += 1
            found.append(self.point(levels))
        return found


class Archive:
    """Non-dominated allocations in the plane of (log damage, bits), by ascending log damage."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []
        self.levels: list[Levels] = []

    def add(self, point: tuple[float, float], levels: Levels) -> None:
        """Keep it if nothing beats it; drop what it beats."""
        at = bisect_left(self.points, point)
        if at and self.points[at - 1][1] <= point[1]:
            return
        end = at
        while end < len(self.points) and self.points[end][1] >= point[1]:
            end += 1
        self.points[at:end], self.levels[at:end] = [point], [levels]


def area(points: Sequence[tuple[float, float]], corner: tuple[float, float]) -> float:
    """Hypervolume below `corner` of points that do not dominate each other."""
    inside = sorted(p for p in points if p[0] < corner[0] and p[1] < corner[1])
    ends = [*(p[0] for p in inside[1:]), corner[0]]
    return sum((end - x) * (corner[1] - y) for (x, y), end in zip(inside, ends, strict=True))


class Sampler(Protocol):
    """Proposes from what it was told."""

    def tell(self, levels: Levels, point: tuple[float, float]) -> None:
        """Learn a measured allocation."""

    def propose(self) -> Levels:
        """The next allocation."""


class Evolution:
    """Switches a few levels of a member of the front, half of the time crossed with a neighbour."""

    def __init__(self, objective: Objective, seed: int) -> None:
        self.archive = Archive()
        self._random = np.random.default_rng([seed, 4])
        self._n_choices, self._n_levels = objective.damage.shape

    def tell(self, levels: Levels, point: tuple[float, float]) -> None:
        """Learn a measured allocation."""
        self.archive.add(point, levels)

    def propose(self) -> Levels:
        """The next allocation."""
        members = self.archive.levels
        at = int(self._random.integers(len(members)))
        levels = members[at].copy()
        if self._random.random() < 0.5 and len(members) > 1:
            other = members[at - 1 if at else 1]
            levels = np.where(self._random.random(self._n_choices) < 0.5, levels, other)
        return self.switched(levels)

    def switched(self, levels: Levels) -> Levels:
        """With one level up or down at a few places."""
        places = self._random.integers(self._n_choices, size=1 + self._random.geometric(0.5))
        steps = self._random.choice((-1, 1), len(places))
        levels[places] = np.clip(levels[places] + steps, 0, self._n_levels - 1)
        return levels


class Surrogate:
    """Fits an additive damage by ridge regression and proposes near its optima.

    Sizes are known exactly, as in a real search. Every other proposal is the optimum for a drawn
    price of a bit, changed at a few places so that each result teaches something; the rest evolve
    the front.
    """

    REFIT_EVERY = 16

    def __init__(self, objective: Objective, seed: int) -> None:
        self._evolution = Evolution(objective, seed)
        self._random = np.random.default_rng([seed, 5])
        self._bits, self._share = objective.bits, objective.share
        n_choices, n_levels = objective.damage.shape
        self._columns = np.arange(n_choices) * n_levels
        self._gram = np.eye(n_choices * n_levels) * 1e-6
        self._moment = np.zeros(n_choices * n_levels)
        self._damage: Floats = np.zeros(objective.damage.shape)
        self._n_told = 0

    def tell(self, levels: Levels, point: tuple[float, float]) -> None:
        """Learn a measured allocation; sometimes refit."""
        self._evolution.tell(levels, point)
        columns = self._columns + levels
        self._gram[np.ix_(columns, columns)] += 1.0
        self._moment[columns] += 10.0 ** point[0]
        self._n_told += 1
        if self._n_told % self.REFIT_EVERY == 0:
            fitted = np.asarray(np.linalg.solve(self._gram, self._moment), dtype=np.float64)
            self._damage = fitted.reshape(self._damage.shape)

    def propose(self) -> Levels:
        """The next allocation."""
        if self._n_told < 2 * self.REFIT_EVERY or self._random.random() < 0.5:
            return self._evolution.propose()
        price = 10.0 ** self._random.uniform(-4, 0)
        total = self._damage + price * self._share[:, None] * self._bits
        return self._evolution.switched(total.argmin(axis=1))


def search_gaps(
    make_sampler: Callable[[Objective, int], Sampler],
    at_trials: Sequence[int],
    in_flight: int,
    seed: int,
    *,
    n_choices: int = 60,
    barrier: bool = False,
) -> list[float]:
    """Missing share of the best possible hypervolume after each number of told trials.

    Args:
        make_sampler: from an objective and a seed; it may use shapes and sizes, not damages.
        at_trials: ascending numbers of told trials at which to look.
        in_flight: proposals whose results are not known yet: the `in_flight - 1` right before
            each one or, at a barrier, those of its own generation.
        seed: of objective and proposals.
        n_choices: of the objective.
        barrier: synchronous generations of `in_flight` trials.
    """
    objective = Objective.draw(n_choices, seed)
    best = area(objective.supported_front(), CORNER)
    sampler, archive, gaps = make_sampler(objective, seed), Archive(), list[float]()
    for level in range(len(LEVEL_BITS)):  # the uniform baselines are known before any proposal
        uniform = np.full(n_choices, level)
        archive.add(objective.point(uniform), uniform)
        sampler.tell(uniform, objective.point(uniform))
    waiting, n_told = deque[Levels](), 0
    while n_told < at_trials[-1]:
        while len(waiting) < in_flight:
            waiting.append(sampler.propose())
        for _ in range(len(waiting) if barrier else 1):
            levels = waiting.popleft()
            point = objective.point(levels)
            archive.add(point, levels)
            sampler.tell(levels, point)
            n_told += 1
            if n_told in at_trials:
                gaps.append(1 - area(archive.points, CORNER) / best)
    return gaps
