"""The engine of the guided sampler: numbers in, levels out; no Optuna, no model.

Each proposal is the best candidate of a pool: points of the predicted front, of the fronts of
posterior samples (Thompson sampling), level swaps and crosses of the measured front, and swaps of
the best of these. Most proposals look for the largest expected hypervolume improvement; every
third one aims at one size: one that the user asked for, or that of a baseline which no other one
beats, to beat it there.

Where several resources count, proposals take turns: each looks at damage against one resource, or
against a mixture of them (`views`). The surrogate of the damage is one.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from autocompress.core import STORAGE, derived_seed
from autocompress.search.guided.archive import Measured, Scale, observations
from autocompress.search.guided.features import Levels, OptionFeatures
from autocompress.search.guided.proposals import crossed, spaced, swapped
from autocompress.search.guided.surrogate import Surrogate
from autocompress.search.guided.views import View, views
from autocompress.search.option_table import Floats, OptionTable
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
        table: predicted damages and costs of the space's options.
        seed: of everything that is drawn.
        aims: totals of the first resource to be best at; the baselines' if there are none.
        resources: what damage is traded for.
    """

    def __init__(
        self,
        table: OptionTable,
        *,
        seed: int,
        aims: Sequence[float] = (),
        resources: Sequence[str] = (STORAGE,),
    ) -> None:
        self._features = OptionFeatures.of(table)
        self._n_resources = len(resources)
        self._views = views(self._features, table, resources)
        pool = _N_PREDICTED + _N_SAMPLES * _N_PER_SAMPLE + _N_SWAPPED + _N_CROSSED + _N_REFINED
        self._share = min(1.0, _MOST_CELLS / (pool * max(len(self._features.n_options), 1)))
        self._seed = seed
        self._aims = tuple(aims)
        self._seen: set[bytes] = set()
        self._pending: dict[int, Proposal] = {}
        self._compared: deque[tuple[float, float]] = deque(maxlen=_RECENT)
        self._fitted: _Fit | None = None

    def tell(self, number: int, measured: Measured) -> None:
        """Learn from trial `number`."""
        self.forget(number, measured.levels)
        if not (measured.damage > 0 and np.isfinite(measured.damage)):
            return
        for view in self._views:
            view.tell(measured)
        if measured.predicted is not None:
            self._compared.append((measured.predicted, measured.damage))

    def forget(self, number: int, levels: Levels) -> None:
        """Trial `number` taught nothing; it is not proposed again."""
        self._pending.pop(number, None)
        self._seen.add(_key(levels))

    def ask(self, number: int) -> Proposal:
        """The next levels; new ones as far as a thousand draws find some."""
        generator = np.random.default_rng(derived_seed("guided", self._seed, number))
        turn, place = divmod(number, len(self._views))
        fit = self._fit()
        look = fit.looks[place]
        aim = self._aim(turn, look)
        pool = self._new(self._pool(look, generator, aim))
        if not len(pool):
            pool = self._anywhere(generator)
        proposal = self._best(pool, fit.surrogate, look, generator, aim)
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

    def _fit(self) -> _Fit:
        """Of a prefix of the tells whose length depends on their number alone."""
        n_told = len(self._views[0].trials)
        # between powers of two the steps are equal
        step = max(1, (1 << n_told.bit_length() >> 1) // _FITS_PER_DOUBLING)
        n_used = n_told - n_told % step
        if self._fitted is None or self._fitted.n_used != n_used:
            used = self._views[0].trials[:n_used]
            scales = [view.scale(n_used) for view in self._views]
            data = observations(used, scales[0], len(self._features.n_options))
            surrogate = Surrogate(self._features, data)
            generator = np.random.default_rng(derived_seed("guided fit", self._seed, n_used))
            drawn = [surrogate.damages(generator) for _ in range(_N_SAMPLES)]
            looks = [
                _Look.of(view, scale, surrogate.damages(), drawn)
                for view, scale in zip(self._views, scales, strict=True)
            ]
            self._fitted = _Fit(n_used, surrogate, tuple(looks))
            _log.info(
                "Surrogate of %d trials: noise %.2f, power %.2f, Kendall's tau of the latest %s.",
                n_used,
                surrogate.noise,
                surrogate.power,
                self.agreement(),
            )
        return self._fitted

    def _aim(self, turn: int, look: _Look) -> _Aim | None:
        """What a proposal is to be best at; None for the whole front."""
        if turn % _AIMED:
            return None
        view = look.view
        goals = [_Aim(aim, (aim,)) for aim in self._aims if view is self._views[0]]
        goals = goals or self._worth_beating(look)
        goals = list({goal.cost: goal for goal in reversed(goals)}.values())[::-1]
        return goals[turn // _AIMED % len(goals)] if goals else None

    def _worth_beating(self, look: _Look) -> list[_Aim]:
        """At baselines that are of use and that no other one beats."""
        scale = look.scale
        rivals = [
            m for m in look.view.rivals if m.damage < scale.broken_damage and m.cost < scale.largest
        ]
        aims = [_Aim(m.cost, self._totals(m.levels)) for m in rivals]
        return [
            aim
            for aim, m in zip(aims, rivals, strict=True)
            if not any(o.damage < m.damage and self._fits(o.levels, aim) for o in rivals)
        ]

    def _totals(self, levels: Levels) -> tuple[Floats, ...]:
        """Total of each resource of levels (..., n_choices)."""
        return tuple(view.total(levels) for view in self._views[: self._n_resources])

    def _pool(self, look: _Look, generator: np.random.Generator, aim: _Aim | None) -> Levels:
        view, fixed = look.view, look.view.fixed
        largest = look.scale.largest - fixed
        parts = [spaced(look.expected, largest, self._count(_N_PREDICTED))]
        if aim is not None:
            for points in (look.expected, *look.drawn):
                point = points.within(aim.cost - fixed)
                parts += [] if point is None else [points.at(point)[None]]
        n_drawn = self._count(_N_PER_SAMPLE)
        parts += [spaced(drawn, largest, n_drawn, generator) for drawn in look.drawn]
        front = [m.levels for m in view.front if m.cost <= look.scale.largest]
        if front:
            parents = np.stack(front)
            parts.append(self._swapped(view, parents, _N_SWAPPED, generator))
            parts.append(crossed(parents, self._count(_N_CROSSED), generator))
        return np.concatenate(parts)

    def _swapped(
        self, view: View, parents: Levels, n_children: int, generator: np.random.Generator
    ) -> Levels:
        """Level swaps among levels that are sorted by the view's cost."""
        n_options = self._features.n_options
        ranks = swapped(view.ranks(parents), n_options, self._count(n_children), generator)
        return view.levels(ranks)

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
        self,
        pool: Levels,
        surrogate: Surrogate,
        look: _Look,
        generator: np.random.Generator,
        aim: _Aim | None,
    ) -> Proposal:
        gain, mean, sd = self._gain(pool, surrogate, look, aim)
        tau = self.agreement()
        if tau is not None and tau < _POOR_TAU and generator.random() < 0.5:
            # The surrogate misleads: what a real measurement says is worth more.
            index = int(generator.integers(len(pool)))
            return Proposal(pool[index], float(mean[index]), float(sd[index]))
        leaders = pool[np.argsort(-gain, kind="stable")[:_N_LEADERS]]
        refined = self._new(self._swapped(look.view, leaders, _N_REFINED, generator))
        if len(refined):
            again = self._gain(refined, surrogate, look, aim)
            pool = np.concatenate((pool, refined))
            gain, mean, sd = (
                np.concatenate(pair) for pair in zip((gain, mean, sd), again, strict=True)
            )
        index = int(gain.argmax())
        return Proposal(pool[index], float(mean[index]), float(sd[index]))

    def _gain(
        self, pool: Levels, surrogate: Surrogate, look: _Look, aim: _Aim | None
    ) -> tuple[Floats, Floats, Floats]:
        """Expected improvement, mean and deviation of the log damage of candidates."""
        mean, sd = surrogate.predict(pool)
        scale, view = look.scale, look.view
        reached = [(m.levels, m.cost, m.damage) for m in view.front]
        # Running trials are taken to measure what was predicted for them.
        reached += [
            (p.levels, float(view.total(p.levels)), float(np.exp(p.log_damage)))
            for p in self._pending.values()
        ]
        damage = np.exp(mean)
        loss_sd = sd * damage / (damage + scale.safe_damage)
        costs, losses = view.total(pool), scale.loss(damage)
        if aim is None:
            stairs = scale.staircase([(cost, found) for _, cost, found in reached])
            return stairs.expected_improvement(costs, losses, loss_sd), mean, sd
        # One that takes more of any resource is no improvement there, and no bar.
        inside = [(cost, found) for levels, cost, found in reached if self._fits(levels, aim)]
        costs = np.where(self._fits(pool, aim), costs, np.inf)
        stairs = scale.staircase(inside)
        return stairs.expected_improvement_at(aim.cost, costs, losses, loss_sd), mean, sd

    def _fits(self, levels: Levels, aim: _Aim) -> NDArray[np.bool_]:
        """Whether levels (..., n_choices) take no more than the aim of each resource it names."""
        totals = self._totals(levels)
        limits = aim.limits
        fits = np.ones(levels.shape[:-1], dtype=np.bool_)
        for total, limit in zip(totals, limits, strict=False):
            fits &= total <= limit
        return fits


@dataclass(frozen=True, slots=True, eq=False)
class _Aim:
    """Where to be best: at a cost in a view, at no more of each resource than its limit."""

    cost: float
    limits: tuple[float | Floats, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Look:
    """One view on the first tells: what counts in it, predicted fronts, expected and drawn."""

    view: View
    scale: Scale
    expected: Sweep
    drawn: tuple[Sweep, ...]

    @classmethod
    def of(cls, view: View, scale: Scale, damages: Floats, drawn: Sequence[Floats]) -> _Look:
        """Sweep the damages, (n_choices, most options) each, over the view's cost."""
        expected = sweep(damages, view.by_choice)
        return cls(view, scale, expected, tuple(sweep(d, view.by_choice) for d in drawn))


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """What is derived from the first `n_used` tells."""

    n_used: int
    surrogate: Surrogate
    looks: tuple[_Look, ...]


def _key(levels: Levels) -> bytes:
    return levels.astype(np.int16).tobytes()
