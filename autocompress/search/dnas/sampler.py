"""Proposes what a training pass prefers.

First the likeliest option of every choice, trade-off by trade-off (the paper's answer); then the
likeliest allocation within given sizes: the aims, and sizes all over the range; then draws from the
trained distributions (AQ-BERT and DNAS, Wu et al. 2018, section 3.4, draw theirs).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from autocompress.core.errors import UsageError
from autocompress.search.dnas.preferences import Preference, from_predictions
from autocompress.search.peers.base import BatchSampler, Levels, Measured, spread_budgets
from autocompress.search.sampler import SAMPLERS
from autocompress.search.solver import solve

_N_SIZES = 24
_DRAWS = 8
"""Draws per proposal that a batch may need, as many of them were seen before."""
_NEVER = 1e6
"""Surprise of an option that is never taken: far above any sum of the others'."""


@SAMPLERS.register("dnas")
class Dnas(BatchSampler):
    """Argmax, likeliest within sizes, then draws of trained distributions.

    The distributions are the option table's preferences (`train_preferences`). For a table without
    them they are those that its damages lead to if they add up, which needs no model.
    """

    name = "dnas"
    summary = "differentiable search: Gumbel-softmax over options, trained on calibration tokens"
    needs_table = True
    needs_training = True

    def _batch(self, first: int, known: Sequence[Measured]) -> Iterator[Levels]:  # noqa: ARG002
        """See `BatchSampler`; depends on the seed and `first` alone."""
        yield from self._likeliest
        generator = self.generator("draws", first)
        for draw in range(_DRAWS * self.batch_size):
            yield self._preferences[(first + draw) % len(self._preferences)].draw(generator)

    @cached_property
    def _preferences(self) -> tuple[Preference, ...]:
        assert self.table is not None
        trained = self.table.preferences
        return tuple(
            Preference(p.weight, self.ordered(p.log_probabilities)) for p in trained
        ) or from_predictions(self.damage, self.costs)

    @cached_property
    def _likeliest(self) -> list[Levels]:
        """Argmax of each trade-off, then of each size under the trade-offs next to it."""
        found = [preference.best for preference in self._preferences]
        fixed = self.option_costs.fixed[self.objectives.main]
        aims = [aim - fixed for aim in self.aims]
        for size in (*aims, *spread_budgets(self.costs, _N_SIZES)):
            found += self._within(float(size))
        return found

    def _within(self, size: float) -> list[Levels]:
        """The likeliest allocation of at most `size` under the two nearest trade-offs."""

        def distance(preference: Preference) -> float:
            return abs(self.cost_of(preference.best) - size)

        found = []
        for preference in sorted(self._preferences, key=distance)[:2]:
            surprise = [np.minimum(-row, _NEVER) for row in preference.log_probabilities]
            try:
                levels = solve(surprise, self.costs, size)
            except UsageError:  # not even the cheapest levels fit
                continue
            found.append(tuple(map(int, levels)))
        return found
