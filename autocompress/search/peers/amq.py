"""AMQ: a space pruned by sensitivity, and NSGA-II on a predictor that is refitted on what it finds.

Lee et al. 2025, AMQ: Enabling AutoML for Mixed-precision Weight-Only Quantization of LLMs,
arXiv 2509.12019.
Each round fits a predictor of damage to everything measured, lets NSGA-II find the predicted front
of (damage, bytes), and measures the members that fill the widest gaps in size. Where the paper pins
sensitive layers (twice the median loss) to the widest of three widths, they lose the lower half of
their options here. The predictor has a linear part and Gaussian kernels, on the log of damage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from autocompress.fronts import non_dominated
from autocompress.search.option_table import Floats
from autocompress.search.peers.base import BatchSampler, Levels, Measured, front
from autocompress.search.sampler import SAMPLERS

Population = NDArray[np.int64]

_SENSITIVE = 2.0
_N_INITIAL = 32
_POPULATION = 64
_GENERATIONS = 20
_LARGEST_FIT = 800
_LEAST_DAMAGE = 1e-9


@SAMPLERS.register("amq")
class Amq(BatchSampler):
    """Probes, a random start, then rounds of predictor and NSGA-II."""

    name = "amq"
    summary = "peer: NSGA-II on a refitted predictor, in a space pruned by sensitivity (AMQ)"

    def _batch(self, first: int, known: Sequence[Measured]) -> Iterator[Levels]:
        """What the phase asks for: probes, random allocations, or a round's gap fillers."""
        generator = self.generator("batch", first)
        probes = list(self._probes())
        missing = [p for p in probes if self._seen.get(p, first) >= first]
        yield from missing
        lowest = self._lowest(probes, known)
        tried = sum(1 for number in self._seen.values() if 0 <= number < first) - len(probes)
        if missing or tried < _N_INITIAL:
            for _ in range(4 * self.batch_size):
                yield self._random(lowest, generator)
        elif known:
            yield from self._round(lowest, known, generator)

    def _probes(self) -> Iterator[Levels]:
        """The mildest model, then each choice alone at its cheapest option."""
        mildest = tuple(int(cost.argmax()) for cost in self.costs)
        yield mildest
        for i, cost in enumerate(self.costs):
            yield (*mildest[:i], int(cost.argmin()), *mildest[i + 1 :])

    def _lowest(self, probes: Sequence[Levels], known: Sequence[Measured]) -> Levels:
        """The lowest level that each choice may still take."""
        by_levels = {entry.levels: entry.damage for entry in known}
        reference = by_levels.get(probes[0], 0.0)
        losses = np.array([by_levels.get(p, np.nan) - reference for p in probes[1:]])
        if np.isnan(losses).all():
            return (0,) * len(losses)
        limit = _SENSITIVE * float(np.nanmedian(losses))
        is_sensitive = np.isnan(losses) | (losses > limit)
        return tuple(n // 2 if s else 0 for n, s in zip(self.n_levels, is_sensitive, strict=True))

    def _random(self, lowest: Levels, generator: np.random.Generator) -> Levels:
        """Levels around a mean that is itself uniform, so that all sizes are met."""
        mean = generator.random()
        spans = np.array(self.n_levels) - 1 - np.array(lowest)
        return tuple(int(v) for v in np.array(lowest) + generator.binomial(spans, mean))

    def _round(
        self, lowest: Levels, known: Sequence[Measured], generator: np.random.Generator
    ) -> Iterator[Levels]:
        """Members of the predicted front, widest gaps in size first."""
        latest = list(known)[-_LARGEST_FIT:]
        predict = _Predictor(self, latest)
        good = np.array(front(known), dtype=np.int64)
        extra = [self._random(lowest, generator) for _ in range(_POPULATION)]
        start = np.concatenate([good, np.array(extra, dtype=np.int64)])[:_POPULATION]
        members = _nsga2(predict, np.maximum(start, lowest), lowest, self.n_levels, generator)
        sizes = predict(members)[:, 1]
        measured = [self.cost_of(levels) for levels in good]
        for i in _widest_gaps(sizes, measured):
            yield tuple(int(v) for v in members[i])


class _Predictor:
    """(damage, bytes) of a population; damages are predicted from what was measured."""

    def __init__(self, sampler: BatchSampler, known: Sequence[Measured]) -> None:
        from sklearn.kernel_ridge import KernelRidge
        from sklearn.linear_model import Ridge

        self._costs = sampler.costs
        features = self._features(np.array([entry.levels for entry in known], dtype=np.int64))
        damages = np.array([entry.damage for entry in known])
        targets = np.log(np.maximum(damages, _LEAST_DAMAGE))
        self._linear = Ridge(alpha=0.1).fit(features, targets)
        rest = targets - self._linear.predict(features)
        gamma = 2.0 / features.shape[1]
        self._kernels = KernelRidge(kernel="rbf", alpha=1e-2, gamma=gamma).fit(features, rest)

    def __call__(self, population: Population) -> Floats:
        """(n, 2) losses."""
        features = self._features(population)
        damage = self._linear.predict(features) + self._kernels.predict(features)
        n_bytes = np.zeros(len(population))
        for cost, levels in zip(self._costs, population.T, strict=True):
            n_bytes += cost[levels]
        return np.column_stack([damage, n_bytes])

    def _features(self, population: Population) -> Floats:
        """Logarithms of bytes between the cheapest and the dearest option: a proxy of bits."""
        columns = []
        for cost, levels in zip(self._costs, population.T, strict=True):
            logs = np.log1p(cost - cost.min()) if cost.min() <= 0 else np.log(cost / cost.min())
            columns.append((logs / (float(logs.max()) or 1.0))[levels])
        return np.column_stack(columns)


def _nsga2(
    predict: _Predictor,
    population: Population,
    lowest: Levels,
    n_levels: Levels,
    generator: np.random.Generator,
) -> Population:
    """The predicted front (Deb et al. 2002): tournaments, uniform crossover, one mutation each."""
    losses = predict(population)
    for _ in range(_GENERATIONS):
        order = _by_rank_and_crowding(losses)
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        rivals = generator.integers(len(population), size=(2, 2, _POPULATION))
        parents = np.where(place[rivals[0]] < place[rivals[1]], rivals[0], rivals[1])
        mask = generator.random((_POPULATION, population.shape[1])) < 0.5
        children = np.where(mask, population[parents[0]], population[parents[1]])
        redrawn = generator.random(children.shape) < 1.0 / population.shape[1]
        children = np.where(redrawn, generator.integers(lowest, n_levels, children.shape), children)
        population = np.unique(np.concatenate([population, children]), axis=0)
        losses = predict(population)
        best = np.sort(_by_rank_and_crowding(losses)[:_POPULATION])
        population, losses = population[best], losses[best]
    front_members: Population = population[non_dominated(losses)]
    return front_members


def _by_rank_and_crowding(losses: Floats) -> NDArray[np.int64]:
    """Indices, best first: by non-domination rank, then by distance to neighbours in the rank."""
    ranks = np.full(len(losses), -1)
    crowding = np.zeros(len(losses))
    rank = 0
    while (ranks < 0).any():
        left = np.flatnonzero(ranks < 0)
        members = left[non_dominated(losses[left])]
        ranks[members] = rank
        crowding[members] = _crowding(losses[members])
        rank += 1
    return np.lexsort((-crowding, ranks))


def _crowding(losses: Floats) -> Floats:
    """Summed distance to the neighbours along each loss; infinite at the ends."""
    total = np.zeros(len(losses))
    for column in losses.T:
        order = np.argsort(column, kind="stable")
        span = float(np.ptp(column)) or 1.0
        gaps = np.full(len(column), np.inf)
        gaps[order[1:-1]] = (column[order[2:]] - column[order[:-2]]) / span
        total += gaps
    return total


def _widest_gaps(sizes: Floats, measured: Sequence[float]) -> Iterator[int]:
    """Candidates in the order in which each lies furthest from all sizes before it."""
    distance = np.abs(sizes[:, None] - np.array([*measured, np.inf])[None]).min(1)
    for _ in range(len(sizes)):
        best = int(distance.argmax())
        yield best
        distance = np.minimum(distance, np.abs(sizes - sizes[best]))
        distance[best] = -np.inf
