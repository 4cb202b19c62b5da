"""Search spaces as values: what may be chosen for which layers of one model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from autocompress.core.allocation import Allocation
from autocompress.core.digest import digest
from autocompress.core.errors import SpaceError, nearest
from autocompress.core.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Option:
    """One level of a choice.

    Attributes:
        label: the scheme as the space file writes it, ratios unresolved; equal in every choice
            that offers the same thing, whatever the layers' shapes.
        schemes: one per layer of the choice, in its order, with every ratio resolved.
        storage_bytes: bytes that the choice's layers store under this option.
    """

    label: str
    schemes: tuple[Scheme, ...]
    storage_bytes: int = 0

    @property
    def is_base(self) -> bool:
        """Whether it leaves every layer as it is."""
        return all(scheme.is_base for scheme in self.schemes)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        schemes = [str(scheme) for scheme in self.schemes]
        return {"label": self.label, "schemes": schemes, "storage_bytes": self.storage_bytes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Option:
        """The inverse of `to_json`."""
        schemes = tuple(Scheme.parse(text) for text in data["schemes"])
        return cls(str(data["label"]), schemes, int(data["storage_bytes"]))


@dataclass(frozen=True)
class Choice:
    """The options of one layer, or of layers that must take the same option (tied layers).

    Attributes:
        name: the layer's name; for tied layers the common part and the rest in braces,
            ``model.layers.0.self_attn.{q_proj,k_proj,v_proj}``.
        layers: names of the layers.
        options: levels, sorted by stored bytes, fewest first.
        base_bytes: bytes of the uncompressed weights of the layers.
    """

    name: str
    layers: tuple[str, ...]
    options: tuple[Option, ...]
    base_bytes: int = 0

    def level(self, schemes: tuple[Scheme, ...]) -> int | None:
        """The level whose schemes are these, or None."""
        return self._levels.get(schemes)

    @cached_property
    def _levels(self) -> dict[tuple[Scheme, ...], int]:
        levels: dict[tuple[Scheme, ...], int] = {}
        for level, option in enumerate(self.options):
            levels.setdefault(option.schemes, level)
        return levels

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        return {
            "name": self.name,
            "layers": list(self.layers),
            "base_bytes": self.base_bytes,
            "options": [option.to_json() for option in self.options],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Choice:
        """The inverse of `to_json`."""
        options = tuple(Option.from_json(option) for option in data["options"])
        return cls(str(data["name"]), tuple(data["layers"]), options, int(data["base_bytes"]))


@dataclass(frozen=True)
class SearchSpace:
    """All choices that one space file gives on one model.

    Levels are a mapping from the choice's name to the index of an option; an allocation is what
    a trial evaluates. Both say the same thing: `decode` and `encode` are inverse.

    Attributes:
        name: of the space file.
        description: one line for people.
        choices: in execution order of their first layer.
        n_dropped: options that the file offers and that some layer cannot use (a rank at or above
            break-even, or below 1) or that save nothing, summed over choices.
        n_merged: options that resolved to the same schemes as an earlier one, summed over choices.
    """

    name: str
    description: str
    choices: tuple[Choice, ...]
    n_dropped: int = field(default=0, compare=False)
    n_merged: int = field(default=0, compare=False)

    @cached_property
    def digest(self) -> str:
        """Stable across processes; equal for spaces that offer the same choices."""
        content = [
            [c.name, list(c.layers), [[str(s) for s in o.schemes] for o in c.options]]
            for c in self.choices
        ]
        return digest(content)

    @cached_property
    def searched_layers(self) -> tuple[str, ...]:
        """Names of all layers that a choice decides about."""
        return tuple(layer for choice in self.choices for layer in choice.layers)

    @property
    def n_combinations(self) -> int:
        """Number of different allocations, exactly."""
        return math.prod(len(choice.options) for choice in self.choices)

    def decode(self, levels: Mapping[str, int]) -> Allocation:
        """The allocation that these levels mean.

        Raises:
            SpaceError: a choice is missing or unknown, or a level is out of range.
        """
        self._check_names(levels)
        schemes: dict[str, Scheme] = {}
        for choice in self.choices:
            level = levels[choice.name]
            if not 0 <= level < len(choice.options):
                raise SpaceError(
                    f"Choice {choice.name!r} has levels 0 to {len(choice.options) - 1}, "
                    f"but got {level}."
                )
            schemes.update(zip(choice.layers, choice.options[level].schemes, strict=True))
        return Allocation.of(schemes)

    def encode(self, allocation: Allocation) -> dict[str, int]:
        """The levels that mean this allocation; the inverse of `decode`.

        Raises:
            SpaceError: the allocation is not in the space; says which layer is the reason.
        """
        outside = sorted(set(allocation) - set(self.searched_layers))
        if outside:
            raise SpaceError(
                f"An allocation of space {self.name!r} compresses searched layers only, but got "
                f"{outside[0]!r}. {nearest(outside[0], self.searched_layers)}"
            )
        levels: dict[str, int] = {}
        for choice in self.choices:
            schemes = tuple(allocation.scheme(layer) for layer in choice.layers)
            level = choice.level(schemes)
            if level is None:
                raise SpaceError(_not_offered(choice, schemes))
            levels[choice.name] = level
        return levels

    def __contains__(self, allocation: object) -> bool:
        if not isinstance(allocation, Allocation):
            return False
        try:
            self.encode(allocation)
        except SpaceError:
            return False
        return True

    def baselines(self) -> tuple[tuple[str, Allocation], ...]:
        """Uniform allocations to beat, mildest first; the base model is not among them.

        See `autocompress.spaces.baselines.uniform_baselines`.
        """
        from autocompress.spaces.baselines import uniform_baselines

        return uniform_baselines(self)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        return {
            "name": self.name,
            "description": self.description,
            "digest": self.digest,
            "n_dropped": self.n_dropped,
            "n_merged": self.n_merged,
            "choices": [choice.to_json() for choice in self.choices],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SearchSpace:
        """The inverse of `to_json`."""
        return cls(
            str(data["name"]),
            str(data["description"]),
            tuple(Choice.from_json(choice) for choice in data["choices"]),
            int(data["n_dropped"]),
            int(data["n_merged"]),
        )

    def summary(self) -> dict[str, Any]:
        """What `autocompress spaces show` prints, as a JSON object.

        Bytes are those of the searched layers alone. `options` counts choices by label.
        """
        labels: dict[str, int] = {}
        for choice in self.choices:
            for option in choice.options:
                labels[option.label] = labels.get(option.label, 0) + 1
        return {
            "name": self.name,
            "description": self.description,
            "digest": self.digest,
            "n_layers": len(self.searched_layers),
            "n_choices": len(self.choices),
            "n_options": sum(len(choice.options) for choice in self.choices),
            "combinations": power_of_ten(self.n_combinations),
            "smallest_bytes": sum(c.options[0].storage_bytes for c in self.choices),
            "base_bytes": sum(c.base_bytes for c in self.choices),
            "n_dropped": self.n_dropped,
            "n_merged": self.n_merged,
            "baselines": [name for name, _ in self.baselines()],
            "options": labels,
        }

    def _check_names(self, levels: Mapping[str, int]) -> None:
        known = {choice.name for choice in self.choices}
        for name in levels.keys() - known:
            raise SpaceError(f"Space {self.name!r} has no choice {name!r}. {nearest(name, known)}")
        missing = sorted(known - levels.keys())
        if missing:
            raise SpaceError(
                f"Space {self.name!r} needs a level for each of its {len(known)} choices, but "
                f"{len(missing)} are missing, the first {missing[0]!r}."
            )


def power_of_ten(count: int) -> str:
    """``10^12.3``; small counts are written out."""
    if count < 100_000:
        return str(count)
    digits = len(str(count)) - 16  # a float holds 16 digits; the rest is counted
    exponent = math.log10(count // 10**digits) + digits if digits > 0 else math.log10(count)
    return f"10^{exponent:.1f}"


def _not_offered(choice: Choice, schemes: tuple[Scheme, ...]) -> str:
    got = " / ".join(dict.fromkeys(str(scheme) for scheme in schemes))
    offered = [" / ".join(dict.fromkeys(str(s) for s in o.schemes)) for o in choice.options]
    return f"Choice {choice.name!r} does not offer {got!r}. {nearest(got, offered)}"
