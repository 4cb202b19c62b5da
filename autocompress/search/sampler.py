"""The sampler contract: who proposes the next allocation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from autocompress.core import DEFAULT_OBJECTIVES, Allocation, Objectives, Registry, TrialResult
from autocompress.core.errors import SpaceError, UsageError
from autocompress.core.objectives import comparable
from autocompress.search.option_table import OptionCosts, OptionTable
from autocompress.spaces import SearchSpace

Constraints = Callable[[TrialResult], Mapping[str, float]]
"""Named constraint values of a complete trial; it is feasible if none of them is above 0."""


class Sampler(ABC):
    """Proposes allocations from a space.

    `ask` depends on the seed, the number and what was told before, never on the clock or on
    global random state, so a study that is resumed from its journal goes on as it would have.

    Attributes:
        name: in the registry; part of ``TrialRequest.source``.
        summary: one line for people.
        adaptive: False if proposals do not depend on what trials measured; the sequence is then
            the same whatever the number of workers.
        needs_table: True if it cannot work without predicted damages.
        needs_training: True if a search trains `OptionTable.preferences` for it first.
        has_one_budget: True if it trades quality for one resource alone.
        aims: totals of the main resource at which the best model is wanted most; a sampler may not
            heed them.
        objectives: the resources that count.
        option_costs: what options add to them.

    Raises:
        UsageError: the objectives name several resources and the sampler has one budget, or it
            uses the costs of one that is not among them.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    adaptive: ClassVar[bool]
    needs_table: ClassVar[bool] = False
    needs_training: ClassVar[bool] = False
    has_one_budget: ClassVar[bool] = False

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        constraints: Constraints | None = None,
        table: OptionTable | None = None,
        aims: Sequence[float] = (),
        objectives: Objectives = DEFAULT_OBJECTIVES,
        costs: OptionCosts | None = None,
    ) -> None:
        require_budgets(type(self), objectives)
        self.space = space
        self.seed = seed
        self.constraints = constraints
        self.table = table
        self.aims = tuple(aims)
        self.objectives = objectives
        own = OptionCosts.of(space) if table is None else table.option_costs
        self.option_costs = own if costs is None else costs
        self.start()

    def costs_of(self, allocation: Allocation) -> tuple[float, ...] | None:
        """What a model takes of each resource; None for an allocation outside the space."""
        try:
            by_name = self.space.encode(allocation)
        except SpaceError:
            return None
        levels = [by_name[choice.name] for choice in self.space.choices]
        totals = (self.option_costs.total(name, levels) for name in self.objectives.resources)
        return tuple(map(comparable, totals))

    def start(self) -> None:  # noqa: B027 (not every sampler keeps anything)
        """Set up what a sampler keeps; the constructor calls it last."""

    @abstractmethod
    def ask(self, number: int) -> Allocation:
        """The allocation of trial `number`; one seen before only if no other was found."""

    @abstractmethod
    def tell(self, result: TrialResult) -> None:
        """Learn from a finished trial: one asked for here, a baseline, or one of an earlier run."""

    def state(self, number: int) -> Mapping[str, Any]:  # noqa: ARG002 (stateless samplers)
        """What `tell` needs besides the result when a later run replays trial `number`."""
        return {}


def require_budgets(kind: type[Sampler], objectives: Objectives) -> None:
    """Refuse several resources for a sampler that has one budget.

    Raises:
        UsageError: names the samplers that can.
    """
    if kind.has_one_budget and len(objectives.resources) > 1:
        able = sorted(name for name in SAMPLERS if not SAMPLERS[name].has_one_budget)
        raise UsageError(
            f"The sampler {kind.name!r} has a budget of one resource, but --optimize "
            f"{objectives.text} names {len(objectives.resources)}. Next step: take "
            f"{', '.join(able[:-1])} or {able[-1]}, or name one resource."
        )


SAMPLERS: Registry[type[Sampler]] = Registry("sampler", "autocompress.samplers")
