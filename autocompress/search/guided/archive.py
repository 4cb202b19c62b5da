"""What was measured so far, and which part of it is worth improving."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.search.guided.features import Levels
from autocompress.search.guided.improvement import Staircase
from autocompress.search.guided.surrogate import Observations
from autocompress.search.option_table import Floats

_SAFE = 0.9995  # retained quality above which a model is as good as the base for most
_NEARLY_SAFE = 0.95
_BROKEN = 0.3  # retained quality below which nobody cares how broken it is
_MOST_FITTED = 320
_FEWEST_FITTED = 96
_MOST_CELLS = 64_000  # trials times choices: what a fit costs grows with both
_SLACK = 1.02


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A finished trial, as numbers.

    Attributes:
        levels: (n_choices,).
        cost: total of what damage is traded for; a guide takes that of the levels.
        damage: positive; of all tokens, or an estimate of that.
        retained: retained quality.
        extra_sd: of the log damage, beyond the surrogate's own error; 0 if all tokens were seen.
        predicted: log damage that was predicted when the trial was proposed.
        retained_error: standard error of the retained quality.
        is_rival: whether it is a baseline, which the front should beat at no more cost.
    """

    levels: Levels
    cost: float
    damage: float
    retained: float
    extra_sd: float = 0.0
    predicted: float | None = None
    retained_error: float = 0.0
    is_rival: bool = False


class MeasuredFront:
    """The non-dominated trials that saw all tokens, kept up to date trial by trial."""

    def __init__(self) -> None:
        self._members: list[Measured] = []

    def __iter__(self) -> Iterator[Measured]:
        return iter(self._members)

    def add(self, trial: Measured) -> None:
        """Take a trial in unless another one has no more cost and no more damage."""
        if trial.extra_sd:
            return
        place = bisect_right(self._members, trial.cost, key=lambda m: m.cost)
        if place and self._members[place - 1].damage <= trial.damage:
            return
        kept = [m for m in self._members[place:] if m.damage < trial.damage]
        before = [m for m in self._members[:place] if m.cost < trial.cost]
        self._members = [*before, trial, *kept]


@dataclass(frozen=True, eq=False)
class Scale:
    """Which differences of damage and cost are worth something, from what was measured.

    Attributes:
        safe_damage: damage of a model that is nearly as good as the base.
        broken_damage: damage of a model that is of no use.
        largest: cost beyond which a model is as good as the base anyway.
    """

    safe_damage: float = 1e-3
    broken_damage: float = 1.0
    largest: float = np.inf

    @classmethod
    def of(cls, trials: Sequence[Measured], largest: float) -> Scale:
        """From trials that saw all tokens; `largest` bounds the cost in any case."""
        if not trials:
            return cls(largest=largest)
        kept, damages = zip(*sorted((m.retained, m.damage) for m in trials), strict=True)
        errors = [m.retained_error for m in trials if m.retained > _NEARLY_SAFE]
        # What the tokens cannot tell from the base is as good as the base.
        as_good = min(_SAFE, 1.0 - float(np.median(errors))) if errors else _SAFE
        safe, broken = np.exp(np.interp((as_good, _BROKEN), kept, np.log(damages)))
        good = [m.cost for m in trials if m.retained > as_good]
        useful = min(_SLACK * min(good), largest) if good else largest
        return cls(float(safe), float(broken), useful)

    def loss(self, damage: Floats) -> Floats:
        """Log damage, flat where the model is as good as the base."""
        loss: Floats = np.log(damage + self.safe_damage)
        return loss

    def staircase(self, points: Sequence[tuple[float, float]]) -> Staircase:
        """The front of (cost, damage) points, in losses, up to where improvements count."""
        table = np.array(points).reshape(-1, 2)
        worst = float(self.loss(np.array(self.broken_damage)))
        return Staircase.of(table[:, 0], self.loss(table[:, 1]), (self.largest, worst))


def observations(trials: Sequence[Measured], scale: Scale, n_choices: int) -> Observations:
    """What a surrogate is fitted to: all trials, or of many those that say most about the front.

    Half of these are nearest to the front, half the latest.
    """
    limit = max(_FEWEST_FITTED, min(_MOST_FITTED, _MOST_CELLS // max(n_choices, 1)))
    used = list(trials)
    if len(used) > limit:
        half = limit // 2
        behind = _behind_front(used[:-half], scale)
        nearest = np.sort(np.argsort(behind, kind="stable")[:half])
        used = [*(used[i] for i in nearest), *used[-half:]]
    return Observations(
        np.array([m.levels for m in used], dtype=np.int64).reshape(-1, n_choices),
        np.log([m.damage for m in used]),
        np.array([m.extra_sd for m in used]),
    )


def _behind_front(trials: Sequence[Measured], scale: Scale) -> Floats:
    """By how much each trial's loss exceeds the front's at its cost, (n,)."""
    stairs = scale.staircase([(m.cost, m.damage) for m in trials if not m.extra_sd])
    best = np.concatenate(([stairs.reference[1]], stairs.losses))
    losses = scale.loss(np.array([m.damage for m in trials]))
    places = np.searchsorted(stairs.costs, [m.cost for m in trials], side="right")
    behind: Floats = losses - best[places]
    return behind
