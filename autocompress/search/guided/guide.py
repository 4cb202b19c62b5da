"""The engine of the guided sampler: numbers in, levels out; no Optuna, no model.

Each proposal is the best candidate of a pool: points of the predicted front, of the fronts of
posterior samples (Thompson sampling), level swaps and crosses of the measured front, and swaps of
the best of these. Most proposals look for the largest expected hypervolume improvement; every
third one aims at one size: one that the user asked for, or that of a baseline, to beat it there.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau

from autocompress.core import derived_seed
from autocompress.search.guided.archive import Measured, MeasuredFront, Scale, observations
from autocompress.search.guided.features import Levels, OptionFeatures
from autocompress.search.guided.proposals import crossed, spaced, swapped
from autocompress.search.guided.surrogate import Surrogate
from autocompress.search.option_table import STORAGE, Floats, OptionTable
from autocompress.search.solver import Sweep, sweep

_log = logging.getLogger(__name__)

_N_PREDICTED = 48
_N_SAMPLES = 3
_N_PER_SAMPLE = 12
_N_SWAPPED = 96
_N_CROSSED = 48
_N_LEADERS = 4
_N_REFINED = 32
_N_ANYWHERE = 1000
_MOST_CELLS = 40_000
"""Candidates times choices that are screened at a time: larger spaces get fewer candidates."""
_FITS_PER_DOUBLING = 16
_RECENT = 16
_FEWEST_FOR_TAU = 4
_POOR_TAU = 0.3
_AIMED = 3  # every third proposal


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """What to try next.

    Attributes:
        levels: (n_choices,).
        log_damage: its predicted mean.
        sd: its predicted standard deviation.
    """

    levels: Levels
    log_damage: float
    sd: float


class Guide:
    """Proposes levels; learns from measurements.

    A proposal depends on the seed, the number and what was told, in the order of the tells.

    Args:
        table: predicted damages and bytes of the space's options.
        seed: of everything that is drawn.
        aims: total bytes to be best at; the baselines' if there are none.
    """

    def __init__(self, table: OptionTable, *, seed: int, aims: Sequence[float] = ()) -> None:
        self._features = OptionFeatures.of(table)
        self._flat_cost = np.concatenate(table.cost(STORAGE))
        self._cost = self._features.by_choice(self._flat_cost)
        self._fixed = table.fixed[STORAGE]
        self._largest = self._fixed + sum(float(c.max()) for c in table.cost(STORAGE))
        pool = _N_PREDICTED + _N_SAMPLES * _N_PER_SAMPLE + _N_SWAPPED + _N_CROSSED + _N_REFINED
        self._share = min(1.0, _MOST_CELLS / (pool * max(len(self._features.n_options), 1)))
        self._seed = seed
        self._aims = tuple(aims)
        self._trials: list[Measured] = []
        self._front = MeasuredFront()
        self._rivals: list[Measured] = []
        self._seen: set[bytes] = set()
        self._pending: dict[int, Proposal] = {}
        self._compared: deque[tuple[float, float]] = deque(maxlen=_RECENT)
        self._fitted: _Fit | None = None

    def tell(self, number: int, measured: Measured) -> None:
        """Learn from trial `number`."""
        self.forget(number, measured.levels)
        if not (measured.damage > 0 and np.isfinite(measured.damage)):
            return
        self._trials.append(measured)
        self._front.add(measured)
        if measured.is_rival:
            self._rivals.append(measured)
        if measured.predicted is not None:
            self._compared.append((measured.predicted, measured.damage))

    def forget(self, number: int, levels: Levels) -> None:
        """Trial `number` taught nothing; it is not proposed again."""
        self._pending.pop(number, None)
        self._seen.add(_key(levels))

    def ask(self, number: int) -> Proposal:
        """The next levels; new ones as far as a thousand draws find some."""
        generator = np.random.default_rng(derived_seed("guided", self._seed, number))
        fit = self._fit()
        aim = self._aim(number, fit.scale)
        pool = self._new(self._pool(fit, generator, aim))
        if not len(pool):
            pool = self._anywhere(generator)
        proposal = self._best(pool, fit, generator, aim)
        self._pending[number] = proposal
        self._seen.add(_key(proposal.levels))
        return proposal

    @property
    def surrogate(self) -> Surrogate:
        """The surrogate as of now."""
        return self._fit().surrogate

    def agreement(self) -> float | None:
        """Kendall's tau between what was predicted before a trial and measured in it.

        Of the latest proposals; None if there are too few.
        """
        if len(self._compared) < _FEWEST_FOR_TAU:
            return None
        tau = kendalltau(*zip(*self._compared, strict=True)).statistic
        return float(tau) if np.isfinite(tau) else None

    def costs(self, levels: Levels) -> Floats:
        """Total bytes of levels (..., n_choices)."""
        total: Floats = self._flat_cost[self._features.rows(levels)].sum(-1) + self._fixed
        return total

    def _fit(self) -> _Fit:
        """Of a prefix of the tells whose length depends on their number alone."""
        n_told = len(self._trials)
        n_used = n_told - n_told % max(1, n_told // _FITS_PER_DOUBLING)
        if self._fitted is None or self._fitted.n_used != n_used:
            used = self._trials[:n_used]
            scale = Scale.of([m for m in used if not m.extra_sd], self._largest)
            data = observations(used, scale, len(self._features.n_options))
            surrogate = Surrogate(self._features, data)
            generator = np.random.default_rng(derived_seed("guided fit", self._seed, n_used))
            drawn = [sweep(surrogate.damages(generator), self._cost) for _ in range(_N_SAMPLES)]
            expected = sweep(surrogate.damages(), self._cost)
            self._fitted = _Fit(n_used, surrogate, scale, expected, tuple(drawn))
            _log.info(
                "Surrogate of %d trials: noise %.2f, power %.2f, Kendall's tau of the latest %s.",
                n_used,
                surrogate.noise,
                surrogate.power,
                self.agreement(),
            )
        return self._fitted

    def _aim(self, number: int, scale: Scale) -> float | None:
        """The bytes that proposal `number` is to be best at; None for the whole front."""
        if number % _AIMED:
            return None
        goals = self._aims or [
            m.cost
            for m in self._rivals
            if m.damage < scale.broken_damage and m.cost < scale.largest
        ]
        return goals[number // _AIMED % len(goals)] if goals else None

    def _pool(self, fit: _Fit, generator: np.random.Generator, aim: float | None) -> Levels:
        largest = fit.scale.largest - self._fixed
        parts = [spaced(fit.expected, largest, self._count(_N_PREDICTED))]
        if aim is not None:
            for points in (fit.expected, *fit.drawn):
                point = points.within(aim - self._fixed)
                parts += [] if point is None else [points.at(point)[None]]
        n_drawn = self._count(_N_PER_SAMPLE)
        parts += [spaced(drawn, largest, n_drawn, generator) for drawn in fit.drawn]
        front = [m.levels for m in self._front if m.cost <= fit.scale.largest]
        if front:
            parents = np.stack(front)
            n_options = self._features.n_options
            parts.append(swapped(parents, n_options, self._count(_N_SWAPPED), generator))
            parts.append(crossed(parents, self._count(_N_CROSSED), generator))
        return np.concatenate(parts)

    def _count(self, candidates: int) -> int:
        return math.ceil(self._share * candidates)

    def _new(self, pool: Levels) -> Levels:
        """Those of the pool that were never proposed or told, each once."""
        keys = [_key(levels) for levels in pool]
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self._seen}
        return pool[sorted(first.values())]

    def _anywhere(self, generator: np.random.Generator) -> Levels:
        n_options = self._features.n_options
        drawn = (generator.random((_N_ANYWHERE, len(n_options))) * n_options).astype(np.int64)
        new = self._new(drawn)
        return new if len(new) else drawn[:1]

    def _best(
        self, pool: Levels, fit: _Fit, generator: np.random.Generator, aim: float | None
    ) -> Proposal:
        gain, mean, sd = self._gain(pool, fit, aim)
        tau = self.agreement()
        if tau is not None and tau < _POOR_TAU and generator.random() < 0.5:
            # The surrogate misleads: what a real measurement says is worth more.
            index = int(generator.integers(len(pool)))
            return Proposal(pool[index], float(mean[index]), float(sd[index]))
        leaders = pool[np.argsort(-gain, kind="stable")[:_N_LEADERS]]
        n_refined = self._count(_N_REFINED)
        refined = self._new(swapped(leaders, self._features.n_options, n_refined, generator))
        if len(refined):
            again = self._gain(refined, fit, aim)
            pool = np.concatenate((pool, refined))
            gain, mean, sd = (
                np.concatenate(pair) for pair in zip((gain, mean, sd), again, strict=True)
            )
        index = int(gain.argmax())
        return Proposal(pool[index], float(mean[index]), float(sd[index]))

    def _gain(self, pool: Levels, fit: _Fit, aim: float | None) -> tuple[Floats, Floats, Floats]:
        """Expected improvement, mean and deviation of the log damage of candidates."""
        mean, sd = fit.surrogate.predict(pool)
        reached = [(m.cost, m.damage) for m in self._front]
        # Running trials are taken to measure what was predicted for them.
        running = [
            (float(self.costs(p.levels)), float(np.exp(p.log_damage)))
            for p in self._pending.values()
        ]
        stairs = fit.scale.staircase([*reached, *running])
        damage = np.exp(mean)
        loss_sd = sd * damage / (damage + fit.scale.safe_damage)
        costs, losses = self.costs(pool), fit.scale.loss(damage)
        if aim is None:
            return stairs.expected_improvement(costs, losses, loss_sd), mean, sd
        return stairs.expected_improvement_at(aim, costs, losses, loss_sd), mean, sd


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """What is derived from the first `n_used` tells: predicted fronts, expected and drawn."""

    n_used: int
    surrogate: Surrogate
    scale: Scale
    expected: Sweep
    drawn: tuple[Sweep, ...]


def _key(levels: Levels) -> bytes:
    return levels.astype(np.int16).tobytes()
