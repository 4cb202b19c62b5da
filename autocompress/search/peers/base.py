"""What the re-implemented peers share: batches of proposals that follow from what was told.

Trial numbers are cut into batches of fixed size. A batch is a function of the seed, its first
number and the results of smaller numbers (and of the baselines), so a study that is resumed in the
middle of a batch computes the same one. A batch may be short; what it lacks, and what was proposed
before, is replaced by a mutation of a good allocation, so that no peer ever runs dry.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from autocompress.core import STORAGE, Allocation, TrialResult, derived_seed
from autocompress.core.errors import UsageError
from autocompress.search.option_table import PerChoice
from autocompress.search.sampler import Sampler

Levels = tuple[int, ...]
"""One level per choice, in the order of the space."""

_BASELINE = -1  # comes before every batch
_MUTATIONS = 16
_CHANGED_CHOICES = 2.0


@dataclass(frozen=True, slots=True)
class Measured:
    """A complete trial of the space: its number, levels, damage and total cost."""

    number: int
    levels: Levels
    damage: float
    cost: float
    is_baseline: bool


class BatchSampler(Sampler):
    """A sampler that proposes batch by batch; subclasses give `_batch`.

    Published allocators have one budget, of bytes; here it may be of another resource. Levels of
    a choice are sorted by it, of equal ones the largest option first: fewer bytes alone gain
    nothing then.

    Attributes:
        costs: what each level adds to the resource, ascending.
        damage: predicted for each level; empty without an option table.

    Raises:
        UsageError: it needs predicted damages and got no option table.
    """

    adaptive = True
    has_one_budget = True
    batch_size: ClassVar[int] = 8

    def start(self) -> None:
        """See `Sampler.start`."""
        if self.needs_table and self.table is None:
            raise UsageError(
                f"The sampler {self.name!r} allocates by predicted damages, but got no option "
                "table. Next step: pass `table=`, or take a sampler that measures for itself, "
                "e.g. 'evopress'."
            )
        self.n_levels: Levels = tuple(len(choice.options) for choice in self.space.choices)
        self._order = self._by_cost()
        self._places = [np.argsort(order) for order in self._order]
        self.costs = self.ordered(self.option_costs.cost(self.objectives.main))
        self.damage = () if self.table is None else self.ordered(self.table.damage)
        self._seen: dict[Levels, int] = {}  # with the first trial of each
        self._measured: dict[int, Measured] = {}
        self._current: tuple[int, list[Levels]] = (-1, [])

    def _by_cost(self) -> list[NDArray[np.int64]]:
        """The space's level by ours, of each choice; the space sorts by bytes."""
        costs = self.option_costs.cost(self.objectives.main)
        n_bytes = self.option_costs.cost(STORAGE)
        return [np.lexsort((-size, cost)) for size, cost in zip(n_bytes, costs, strict=True)]

    def ordered(self, values: PerChoice) -> PerChoice:
        """Values of the space's levels in the order of ours."""
        return tuple(value[order] for value, order in zip(values, self._order, strict=True))

    @abstractmethod
    def _batch(self, first: int, known: Sequence[Measured]) -> Iterable[Levels]:
        """Proposals from trial `first` on, the best first; as many as there are.

        Args:
            first: number of the batch's first trial.
            known: complete baselines and trials before `first`, by number.
        """

    def ask(self, number: int) -> Allocation:
        """See `Sampler.ask`."""
        first = number - number % self.batch_size
        if self._current[0] != first:
            proposals = distinct(self._batch(first, self._known(first)))
            fresh = (levels for levels in proposals if self._seen.get(levels, first) >= first)
            self._current = (first, list(itertools.islice(fresh, self.batch_size)))
        batch = self._current[1]
        position = number - first
        levels = batch[position] if position < len(batch) else None
        if levels is None or levels in self._seen:
            levels = self._mutation(number)
        self._seen.setdefault(levels, number)
        return self.decode(levels)

    def tell(self, result: TrialResult) -> None:
        """See `Sampler.tell`; what failed is not proposed again and teaches nothing else."""
        request = result.request
        if request.allocation not in self.space:
            return
        levels = self.encode(request.allocation)
        number = _BASELINE if request.is_baseline else request.number
        self._seen[levels] = min(number, self._seen.get(levels, number))
        if not result.is_complete or result.metrics is None:
            return
        damage, cost = self.objectives.losses(result.metrics)
        if np.isfinite(damage):
            entry = Measured(request.number, levels, damage, cost, request.is_baseline)
            self._measured[request.number] = entry

    def encode(self, allocation: Allocation) -> Levels:
        """Levels of an allocation of the space."""
        levels = self.space.encode(allocation)
        places = zip(self.space.choices, self._places, strict=True)
        return tuple(int(place[levels[choice.name]]) for choice, place in places)

    def decode(self, levels: Sequence[int]) -> Allocation:
        """The inverse of `encode`."""
        ours = zip(self.space.choices, self._order, levels, strict=True)
        return self.space.decode({c.name: int(order[level]) for c, order, level in ours})

    def generator(self, purpose: str, number: int) -> np.random.Generator:
        """Random numbers that depend on seed, sampler, purpose and number alone."""
        return np.random.default_rng(derived_seed(self.seed, self.name, purpose, number))

    def cost_of(self, levels: Sequence[int]) -> float:
        """What the searched layers take."""
        return sum(float(c[level]) for c, level in zip(self.costs, levels, strict=True))

    def _known(self, first: int) -> list[Measured]:
        found = [m for n, m in self._measured.items() if n < first or m.is_baseline]
        return sorted(found, key=lambda m: m.number)

    def _mutation(self, number: int) -> Levels:
        """An allocation near the measured front that was not seen; any unseen one failing that."""
        generator = self.generator("mutation", number)
        parents = front(list(self._measured.values())) or [self._mildest()]
        for attempt in range(_MUTATIONS):
            levels = list(parents[int(generator.integers(len(parents)))])
            chance = min(1.0, _CHANGED_CHOICES * (1 + attempt) / max(1, len(levels)))
            for i in np.flatnonzero(generator.random(len(levels)) < chance):
                levels[i] = int(generator.integers(self.n_levels[i]))
            if tuple(levels) not in self._seen:
                return tuple(levels)
        everything = itertools.product(*(range(n) for n in self.n_levels))
        return next((each for each in everything if each not in self._seen), self._mildest())

    def _mildest(self) -> Levels:
        return tuple(n - 1 for n in self.n_levels)


def front(measured: Sequence[Measured]) -> list[Levels]:
    """Levels of the trials that no other beats on damage and cost, cheapest first."""
    kept: list[Levels] = []
    best = float("inf")
    for entry in sorted(measured, key=lambda m: (m.cost, m.damage, m.number)):
        if entry.damage < best:
            kept.append(entry.levels)
            best = entry.damage
    return kept


def distinct(levels: Iterable[Levels]) -> Iterator[Levels]:
    """Without what came before."""
    seen: set[Levels] = set()
    for each in levels:
        if each not in seen:
            seen.add(each)
            yield each


def spread_budgets(costs: PerChoice, count: int) -> NDArray[np.float64]:
    """Budgets between the cheapest and the dearest allocation, coarse to fine.

    The van der Corput sequence (halves, quarters, eighths, ...): any beginning of it covers the
    range evenly, whatever number of trials a study has.
    """
    low = sum(float(c.min()) for c in costs)
    high = sum(float(c.max()) for c in costs)
    fractions = [_bit_reversed(k) for k in range(1, count + 1)]
    return low + (high - low) * np.array(fractions)


def _bit_reversed(k: int) -> float:
    value, scale = 0.0, 0.5
    while k:
        value += scale * (k & 1)
        k >>= 1
        scale /= 2
    return value


class BudgetSweep(BatchSampler):
    """A solver over predicted damages, asked for one budget after the other."""

    needs_table = True
    n_budgets: ClassVar[int] = 4096
    patience: ClassVar[int] = 12

    def start(self) -> None:
        """See `Sampler.start`."""
        super().start()
        self._budgets = iter(spread_budgets(self.costs, self.n_budgets))
        self._solved: dict[Levels, None] = {}

    @abstractmethod
    def solve(self, budget: float) -> Levels:
        """Levels that cost at most `budget`, the searched layers alone."""

    def _batch(self, first: int, known: Sequence[Measured]) -> Iterator[Levels]:  # noqa: ARG002
        """Different solutions in the order of their budgets, each solved once.

        The sweep ends when a row of budgets gave nothing new.
        """
        yield from tuple(self._solved)
        fruitless = 0
        for budget in self._budgets:
            levels = self.solve(float(budget))
            fruitless = fruitless + 1 if levels in self._solved else 0
            if levels not in self._solved:
                self._solved[levels] = None
                yield levels
            if fruitless == self.patience:
                self._budgets = iter(())
                return
