"""All samplers; here those that are Optuna's own, on its ask and tell.

Each choice of the space is one integer parameter: the index of its option. Options are sorted by
stored bytes, so neighbouring values are neighbouring sizes.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from autocompress.core import (
    DEFAULT_OBJECTIVES,
    Allocation,
    Objectives,
    TrialResult,
    derived_seed,
)
from autocompress.search import peers
from autocompress.search.dnas.sampler import Dnas
from autocompress.search.guided.sampler import Guided
from autocompress.search.opening import crossed_baselines
from autocompress.search.sampler import SAMPLERS, Constraints, Sampler
from autocompress.spaces import SearchSpace

__all__ = [
    "SAMPLERS",
    "Dnas",
    "Gp",
    "Guided",
    "Nsga2",
    "OptunaSampler",
    "RandomSearch",
    "Tpe",
    "distributions",
    "peers",
]

Levels = tuple[tuple[str, int], ...]


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """One integer parameter per choice: the index of its option, by stored bytes."""
    return {c.name: IntDistribution(0, len(c.options) - 1) for c in space.choices}


def outcome(
    result: TrialResult,
    constraints: Constraints | None,
    objectives: Objectives = DEFAULT_OBJECTIVES,
) -> dict[str, Any]:
    """State, values and constraints of a finished trial in Optuna's words.

    A trial that was stopped early is a pruned one and has no values: those on fewer tokens cannot
    be compared with the others'.
    """
    if result.is_early_stopped:
        return {"state": TrialState.PRUNED}
    if result.metrics is None or not result.is_complete:
        return {"state": TrialState.FAIL}
    values = {"state": TrialState.COMPLETE, "values": list(objectives.losses(result.metrics))}
    if constraints is None:
        return values
    return values | {"constraints": dict(constraints(result))}


class _Reproducible(BaseSampler):
    """Draws one trial with a sampler that is seeded from (seed, number, draw) alone.

    Redraws while the proposal was seen before: first with the method itself, then uniformly. The
    space is given instead of inferred, which spares a scan over all trials.
    """

    def __init__(self, owner: OptunaSampler, number: int) -> None:
        self._owner = owner
        self._number = number

    def infer_relative_search_space(
        self,
        study: Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:
        return {n: d for n, d in self._owner.distributions.items() if not d.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        params: dict[str, Any] = {}
        for draw in range(2 * self._owner.n_draws):
            params = self._draw(draw, study, trial, search_space)
            if not self._owner.was_seen(params):
                break
        return params

    def _draw(
        self,
        draw: int,
        study: Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        owner = self._owner
        params: dict[str, Any] = {}
        if draw < owner.n_draws:
            seed = derived_seed(owner.seed, owner.name, self._number, draw)
            params = owner.make_sampler(seed).sample_relative(study, trial, search_space)
            if not params and owner.adaptive:  # too few trials for the method itself
                params = crossed_baselines(owner.space, seed)
        # What is left open (mutations) is uniform, from a stream of its
        # own: Optuna would seed both streams alike, and mutations would follow from crossovers.
        uniform = RandomSampler(seed=derived_seed(owner.seed, "uniform", self._number, draw))
        params = {name: level for name, level in params.items() if name in search_space}
        for name, distribution in search_space.items():
            if name not in params:
                params[name] = uniform.sample_independent(study, trial, name, distribution)
        return params

    def sample_independent(
        self,
        study: Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
        param_name: str,
        param_distribution: BaseDistribution,  # noqa: ARG002
    ) -> Any:
        raise AssertionError(f"{param_name} is drawn with all others")


class OptunaSampler(Sampler):
    """A sampler that is an Optuna sampler over an in-memory study of the losses.

    Attributes:
        n_draws: proposals of the method itself before the redraws become uniform, and again as
            many of those.
    """

    n_draws: ClassVar[int] = 8

    def start(self) -> None:
        """See `Sampler.start`."""
        self.distributions = distributions(self.space)
        self.study = new_study(objectives=self.objectives)
        self._pending: dict[int, Trial] = {}
        self._seen: set[Levels] = set()

    @abstractmethod
    def make_sampler(self, seed: int) -> BaseSampler:
        """The Optuna sampler that draws one proposal."""

    def was_seen(self, params: Mapping[str, int]) -> bool:
        """True if these levels were proposed or told before; fixed levels may be left out."""
        return self._key(params) in self._seen

    def _key(self, params: Mapping[str, int]) -> Levels:
        return tuple((name, int(params.get(name, 0))) for name in self.distributions)

    def ask(self, number: int) -> Allocation:
        """See `Sampler.ask`."""
        self.study.sampler = _Reproducible(self, number)
        trial = self.study.ask(self.distributions)
        self._pending[number] = trial
        self._seen.add(self._key(trial.params))
        return self.space.decode(trial.params)

    def tell(self, result: TrialResult) -> None:
        """See `Sampler.tell`; a failed trial is told as such and has no losses."""
        trial = self._pending.pop(result.request.number, None)
        told = outcome(result, self.constraints, self.objectives)
        if trial is None:
            self._add(result, told)
            return
        for name, value in told.get("constraints", {}).items():
            trial.set_constraint(name, value)
        self.study.tell(trial, told.get("values"), state=told["state"])

    def _add(self, result: TrialResult, told: Mapping[str, Any]) -> None:
        """A baseline or a trial of an earlier run; one outside the space teaches nothing."""
        allocation = result.request.allocation
        if allocation not in self.space:
            return
        params = self.space.encode(allocation)
        self._seen.add(self._key(params))
        attributes = result.sampler_state or self.told_state()
        frozen = create_trial(
            params=params,
            distributions=self.distributions,
            system_attrs=dict(attributes),
            **told,
        )
        self.study.add_trial(frozen)

    def told_state(self) -> Mapping[str, Any]:
        """System attributes of a trial that is told without having been asked for."""
        return {}


def new_study(
    storage: BaseStorage | None = None,
    name: str | None = None,
    objectives: Objectives = DEFAULT_OBJECTIVES,
) -> Study:
    """An empty study of the losses, in memory unless a storage is given; says nothing."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(
            storage=storage, study_name=name, directions=["minimize"] * len(objectives.names)
        )
    finally:
        optuna.logging.set_verbosity(verbosity)


@SAMPLERS.register("random")
class RandomSearch(OptunaSampler):
    """Independent uniform draws of every choice's level."""

    name = "random"
    summary = "uniform and independent; the sequence does not depend on results or workers"
    adaptive = False

    def make_sampler(self, seed: int) -> BaseSampler:
        """Uniform."""
        return RandomSampler(seed=seed)


@SAMPLERS.register("tpe")
class Tpe(OptunaSampler):
    """Multivariate tree-structured Parzen estimator (Ozaki et al. 2022, for several losses)."""

    name = "tpe"
    summary = "multivariate tree-structured Parzen estimator; strong on small budgets"
    adaptive = True

    def make_sampler(self, seed: int) -> BaseSampler:
        """Running trials count as bad ones, so that workers do not meet at one point."""
        return TPESampler(seed=seed, multivariate=True, constant_liar=True)


@SAMPLERS.register("gp")
class Gp(OptunaSampler):
    """Gaussian processes and expected hypervolume improvement (Daulton et al., 2020)."""

    name = "gp"
    summary = "Gaussian processes of the losses; few choices and few trials only, slow beyond"
    adaptive = True
    n_draws = 2  # each takes seconds

    def make_sampler(self, seed: int) -> BaseSampler:
        """Optuna's; its kernel is refitted for each proposal, in a time cubic in the trials."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return GPSampler(seed=seed)


class OrderedNsga2(NSGAIISampler):
    """NSGA-II whose parents come in the order of their trials.

    Optuna keeps the parents of a generation as a set: the first child sees them in the order of
    selection, later ones in the order of trials, and a replayed study could not tell which.
    """

    def select_parent(self, study: Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)


@SAMPLERS.register("nsga2")
class Nsga2(OptunaSampler):
    """NSGA-II (Deb et al., 2002) with uniform crossover; the baselines are in generation 0."""

    name = "nsga2"
    summary = "genetic algorithm on the front's non-domination ranks and crowding; cheap per trial"
    adaptive = True
    population_size = 16

    def make_sampler(self, seed: int) -> BaseSampler:
        """A small population: budgets are tens to hundreds of trials."""
        return OrderedNsga2(population_size=self.population_size, seed=seed)

    def told_state(self) -> Mapping[str, Any]:
        """Generation 0."""
        return {_GENERATION: 0}

    def state(self, number: int) -> Mapping[str, Any]:
        """The generation that the trial belongs to."""
        trial = self._pending.get(number)
        if trial is None:
            return self.told_state()
        asked = self.study.get_trials(deepcopy=False)[trial.number]
        return {_GENERATION: asked.system_attrs[_GENERATION]}


_GENERATION = f"{OrderedNsga2.__name__}:generation"
