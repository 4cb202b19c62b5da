"""The sampler contract: who proposes the next allocation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from autocompress.core import Allocation, Registry, TrialResult
from autocompress.search.option_table import OptionTable
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
        aims: total bytes at which the best model is wanted most; a sampler may not heed them.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    adaptive: ClassVar[bool]
    needs_table: ClassVar[bool] = False
    needs_training: ClassVar[bool] = False

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        constraints: Constraints | None = None,
        table: OptionTable | None = None,
        aims: Sequence[float] = (),
    ) -> None:
        self.space = space
        self.seed = seed
        self.constraints = constraints
        self.table = table
        self.aims = tuple(aims)
        self.start()

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


SAMPLERS: Registry[type[Sampler]] = Registry("sampler", "autocompress.samplers")
