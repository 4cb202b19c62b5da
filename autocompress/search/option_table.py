"""The option table: what each option of each choice is predicted to damage and known to cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autocompress.core import STORAGE, digest
from autocompress.core.errors import UsageError, nearest
from autocompress.search.dnas.preferences import Preference
from autocompress.spaces import SearchSpace

Floats = NDArray[np.float64]
PerChoice = tuple[Floats, ...]
"""One array per choice of the space, in its order; index: the level of the choice."""


@dataclass(frozen=True, eq=False)
class OptionCosts:
    """What each option of a space adds to the resources of the model; known from shapes alone.

    Attributes:
        added: by the name of a resource, one value per option of each choice.
        fixed: by the name of a resource, what all that is not searched adds.
    """

    added: Mapping[str, PerChoice]
    fixed: Mapping[str, float]

    @classmethod
    def of(cls, space: SearchSpace) -> OptionCosts:
        """Bytes of the searched layers, the one cost that a space itself knows."""
        n_bytes = tuple(
            np.array([option.storage_bytes for option in choice.options], dtype=np.float64)
            for choice in space.choices
        )
        return cls({STORAGE: n_bytes}, {STORAGE: 0.0})

    def cost(self, resource: str) -> PerChoice:
        """What each option adds to a resource.

        Raises:
            UsageError: it is not among the known ones.
        """
        if resource not in self.added:
            raise UsageError(
                f"The table has no resource {resource!r}. {nearest(resource, self.added)}"
            )
        return self.added[resource]

    def total(self, resource: str, levels: Sequence[int]) -> float:
        """The resource of a whole model: `fixed` and what the levels add."""
        parts = zip(self.cost(resource), levels, strict=True)
        return self.fixed[resource] + sum(float(values[level]) for values, level in parts)


@dataclass(frozen=True, eq=False)
class OptionTable:
    """Predicted damage and additive costs, aligned with the choices of one search space.

    Attributes:
        names: of the choices.
        roles: role of each choice's first layer, e.g. ``query``, ``down``, ``embedding``.
        depths: position of each choice along the blocks, 0 to 1; outside the blocks -1 before
            them and 2 after them.
        labels: of the options of each choice, as the space writes them.
        damage: predicted damage of each option alone, in the unit of the task's damage, not
            negative, 0 for the base option.
        costs: by the name of a resource, what each option adds to it, e.g. ``storage_bytes``.
        fixed: by the name of a resource, what all that is not searched adds.
        preferences: distributions that a training pass found, for samplers that draw from them;
            empty without one.
    """

    names: tuple[str, ...]
    roles: tuple[str, ...]
    depths: tuple[float, ...]
    labels: tuple[tuple[str, ...], ...]
    damage: PerChoice
    costs: Mapping[str, PerChoice]
    fixed: Mapping[str, float]
    preferences: tuple[Preference, ...] = ()

    def __post_init__(self) -> None:
        n_options = [len(labels) for labels in self.labels]
        trained = [("preferences", p.log_probabilities) for p in self.preferences]
        for what, arrays in (("damage", self.damage), *self.costs.items(), *trained):
            if [len(array) for array in arrays] != n_options:
                raise ValueError(f"{what} must have one value per option of each choice.")

    @property
    def option_costs(self) -> OptionCosts:
        """The costs without the damages."""
        return OptionCosts(self.costs, self.fixed)

    def cost(self, resource: str) -> PerChoice:
        """What each option adds to a resource.

        Raises:
            UsageError: the table has no such resource.
        """
        return self.option_costs.cost(resource)

    def total(self, resource: str, levels: Sequence[int]) -> float:
        """The resource of a whole model: `fixed` and what the levels add."""
        return self.option_costs.total(resource, levels)

    def predicted(self, levels: Sequence[int]) -> float:
        """Sum of the predicted damages: additive, so blind to how errors combine."""
        return sum(float(d[level]) for d, level in zip(self.damage, levels, strict=True))

    @cached_property
    def digest(self) -> str:
        """Stable across processes."""
        return digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        data = {
            "names": list(self.names),
            "roles": list(self.roles),
            "depths": list(self.depths),
            "labels": [list(labels) for labels in self.labels],
            "damage": [values.tolist() for values in self.damage],
            "costs": {n: [v.tolist() for v in arrays] for n, arrays in self.costs.items()},
            "fixed": dict(self.fixed),
        }
        if self.preferences:
            data["preferences"] = [preference.to_json() for preference in self.preferences]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OptionTable:
        """The inverse of `to_json`."""
        return cls(
            names=tuple(data["names"]),
            roles=tuple(data["roles"]),
            depths=tuple(map(float, data["depths"])),
            labels=tuple(tuple(labels) for labels in data["labels"]),
            damage=_arrays(data["damage"]),
            costs={name: _arrays(arrays) for name, arrays in data["costs"].items()},
            fixed={name: float(value) for name, value in data["fixed"].items()},
            preferences=tuple(map(Preference.from_json, data.get("preferences", ()))),
        )


def _arrays(rows: Sequence[Sequence[float]]) -> PerChoice:
    return tuple(np.asarray(row, dtype=np.float64) for row in rows)
