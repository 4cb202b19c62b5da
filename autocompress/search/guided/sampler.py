"""The guided sampler behind both contracts: this package's, and Optuna's for studies elsewhere."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autocompress.core import DEFAULT_OBJECTIVES, Allocation, Objectives, TrialResult
from autocompress.core.errors import SpaceError, UsageError
from autocompress.search.guided.archive import Measured
from autocompress.search.guided.guide import Guide, Proposal
from autocompress.search.guided.surrogate import Surrogate
from autocompress.search.option_table import Floats, OptionTable
from autocompress.search.sampler import SAMPLERS, Sampler
from autocompress.spaces import SearchSpace

_PREDICTED = "predicted_log_damage"
_SD = "predicted_sd"
_TAU = "kendall_tau"
_EXTRA_SD = 0.1
"""Uncertainty of a log damage that is extrapolated from the first rungs."""
_N_COMPARED = 32
RETAINED = "retained"
"""User attribute of an Optuna trial: its retained quality."""


@SAMPLERS.register("guided")
class Guided(Sampler):
    """Starts at the predicted front; every measurement corrects the prediction; see `Guide`."""

    name = "guided"
    summary = "predicted front first, corrected by every measurement; the best use of few trials"
    adaptive = True
    needs_table = True

    def start(self) -> None:
        """See `Sampler.start`."""
        self._guide = Guide(
            _matching(self.table, self.space),
            seed=self.seed,
            aims=self.aims,
            resources=self.objectives.resources,
        )
        self._names = [choice.name for choice in self.space.choices]
        self._proposed: dict[int, Proposal] = {}
        self._whole: deque[Floats] = deque(maxlen=_N_COMPARED)

    def ask(self, number: int) -> Allocation:
        """See `Sampler.ask`."""
        proposal = self._guide.ask(number)
        self._proposed[number] = proposal
        levels = map(int, proposal.levels)
        return self.space.decode(dict(zip(self._names, levels, strict=True)))

    def tell(self, result: TrialResult) -> None:
        """See `Sampler.tell`; what an early-stopped trial saw is extrapolated to all tokens."""
        number = result.request.number
        self._proposed.pop(number, None)
        try:
            by_name = self.space.encode(result.request.allocation)
        except SpaceError:  # outside the space: it teaches nothing
            return
        levels = np.array([by_name[name] for name in self._names], dtype=np.int64)
        stopped = result.is_early_stopped
        if result.metrics is None or not (stopped or result.is_complete):
            self._guide.forget(number, levels)
            return
        quality = result.metrics.quality
        growth = self._growth(len(result.damages)) if stopped else 1.0
        if not stopped and result.damages:
            self._whole.append(np.array(result.damages))
        predicted = result.sampler_state.get(_PREDICTED)
        measured = Measured(
            levels=levels,
            cost=self.objectives.costs(result.metrics)[0],
            damage=quality.damage.value * growth,
            retained=quality.retained,
            extra_sd=_EXTRA_SD if stopped else 0.0,
            predicted=None if predicted is None else float(predicted),
            retained_error=quality.standard_error if math.isfinite(quality.standard_error) else 0.0,
            is_rival=result.request.is_baseline,
        )
        self._guide.tell(number, measured)

    @property
    def surrogate(self) -> Surrogate:
        """The surrogate as of now."""
        return self._guide.surrogate

    def state(self, number: int) -> Mapping[str, Any]:
        """What was predicted for the trial, and how well earlier predictions ranked trials."""
        proposal = self._proposed.get(number)
        if proposal is None:
            return {}
        state = {_PREDICTED: round(proposal.log_damage, 6), _SD: round(proposal.sd, 6)}
        tau = self._guide.agreement()
        return state if tau is None else {**state, _TAU: round(tau, 4)}

    def _growth(self, n_seen: int) -> float:
        """Mean damage of all sequences over that of the first ones, in trials that saw all."""
        ratios = [
            float(damages.mean() / damages[:n_seen].mean())
            for damages in self._whole
            if 0 < n_seen < len(damages) and damages[:n_seen].mean() > 0
        ]
        return float(np.median(ratios)) if ratios else 1.0


class GuidedSampler(BaseSampler):
    """The same for an Optuna study of one's own.

    The study minimises the damage and the total of each resource, two values by default: damage
    and bytes. Its parameters are the choices of the table, each an integer level. A trial may carry
    its retained quality as the user attribute ``retained``; without one, ``exp(-damage)`` is taken.

    Args:
        table: predicted damages and costs.
        seed: of all that is drawn.
        objectives: the resources, in the order of the study's values.
    """

    def __init__(
        self, table: OptionTable, *, seed: int = 0, objectives: Objectives = DEFAULT_OBJECTIVES
    ) -> None:
        self._guide = Guide(table, seed=seed, resources=objectives.resources)
        self._names = table.names
        self._space: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(labels) - 1)
            for name, labels in zip(table.names, table.labels, strict=True)
        }
        self._told: set[int] = set()

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """What to give `study.ask`, one integer parameter per choice."""
        return dict(self._space)

    def infer_relative_search_space(
        self,
        study: Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:
        """All choices."""
        return dict(self._space)

    def sample_relative(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],  # noqa: ARG002
    ) -> dict[str, Any]:
        """Levels of all choices, after learning from what the study finished meanwhile."""
        for finished in study.get_trials(deepcopy=False):
            if finished.state.is_finished() and finished.number not in self._told:
                self._learn(finished)
        levels = map(int, self._guide.ask(trial.number).levels)
        return dict(zip(self._names, levels, strict=True))

    def sample_independent(
        self,
        study: Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
        param_name: str,
        param_distribution: BaseDistribution,  # noqa: ARG002
    ) -> Any:
        """Never used for choices of the table.

        Raises:
            UsageError: the study asks for a parameter that is none.
        """
        raise UsageError(
            f"The guided sampler knows the choices of its table, but the study asks for "
            f"{param_name!r}. Next step: ask with the sampler's `distributions`."
        )

    def _learn(self, trial: FrozenTrial) -> None:
        self._told.add(trial.number)
        if set(trial.params) != set(self._names):
            return
        levels = np.array([trial.params[name] for name in self._names], dtype=np.int64)
        if trial.state is not TrialState.COMPLETE:
            self._guide.forget(trial.number, levels)
            return
        damage, cost = trial.values[:2]
        retained = float(trial.user_attrs.get(RETAINED, math.exp(-damage)))
        self._guide.tell(trial.number, Measured(levels, cost, damage, retained))


def _matching(table: OptionTable | None, space: SearchSpace) -> OptionTable:
    """The table, if it is one of this space.

    Raises:
        UsageError: there is none, or it is that of another space.
    """
    if table is None:
        raise UsageError(
            "The guided sampler needs the option table of its space, but got none. Next step: "
            "build one with `autocompress.search.build_table`, or take the sampler nsga2."
        )
    sizes = [len(choice.options) for choice in space.choices]
    same_names = table.names == tuple(choice.name for choice in space.choices)
    if not same_names or [len(labels) for labels in table.labels] != sizes:
        raise UsageError(
            f"The option table is not that of the space {space.name!r}: its choices differ. Next "
            "step: build it again."
        )
    return table
