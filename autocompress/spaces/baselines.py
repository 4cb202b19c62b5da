"""Uniform allocations of a search space: what every search has to beat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal

from autocompress.core.allocation import Allocation
from autocompress.core.errors import SchemeError
from autocompress.core.scheme import Scheme
from autocompress.spaces.space import Choice, Option, SearchSpace

LevelKind = Literal["bits", "sparsity", "parameter_ratio"]
_KINDS: tuple[LevelKind, ...] = ("bits", "sparsity", "parameter_ratio")

_NAMES: dict[LevelKind, Callable[[float], str]] = {
    "bits": lambda value: f"uniform-{value:g}bit",
    "sparsity": lambda value: f"uniform-{100 * value:g}%-sparse",
    "parameter_ratio": lambda value: f"uniform-{100 * value:g}%-rank",
}


def uniform_baselines(space: SearchSpace) -> tuple[tuple[str, Allocation], ...]:
    """Named uniform allocations, mildest first, each a member of the space.

    The first of these that at least half of the searched layers offer on its own decides what
    "uniform" means: bit width (a scheme of one quantize stage), sparsity, kept parameters. At each
    of its levels every choice takes its option of that level; where it has none, the nearest
    milder one; else the base; else its dearest option. Where a choice has several options of one
    level (two group sizes) the dearest stands for it, so that the baseline is a strong one. A
    space that offers none of the three has one baseline for each label that at least half of the
    layers share.
    """
    kind = shared_kind(space)
    if kind is None:
        named = _by_label(space)
    else:
        values = {v for c in space.choices for v in levels_of(c, kind)}
        mildest_first = sorted(values, reverse=kind != "sparsity")
        named = [(_NAMES[kind](v), _uniform(space, kind, v)) for v in mildest_first]
    return _without_base_and_repeats(named)


def shared_kind(space: SearchSpace) -> LevelKind | None:
    """What "uniform" means in the space; None if it is the label."""
    n_layers = len(space.searched_layers)
    for kind in _KINDS:
        offering = sum(len(c.layers) for c in space.choices if levels_of(c, kind))
        if offering and 2 * offering >= n_layers:
            return kind
    return None


def levels_of(choice: Choice, kind: LevelKind) -> dict[float, int]:
    """Value of `kind` to the level that stands for it."""
    levels: dict[float, int] = {}
    for level, option in enumerate(choice.options):  # sorted by bytes: the dearest is kept
        value = _value(option, kind)
        if value is None:
            continue
        best = levels.get(value)
        if best is None or option.storage_bytes > choice.options[best].storage_bytes:
            levels[value] = level
    return levels


def _value(option: Option, kind: LevelKind) -> float | None:
    """The option's value of `kind` if it is a scheme of that one stage, else None."""
    scheme = option.schemes[0]
    if kind == "parameter_ratio":  # resolved to ranks that differ by shape: only the label has it
        try:
            scheme = Scheme.parse(option.label)
        except SchemeError:
            return None
    if len(scheme.stages) != 1:
        return None
    value = dict(scheme.stages[0].options).get(kind)
    return float(value) if isinstance(value, int | float) else None


def _uniform(space: SearchSpace, kind: LevelKind, value: float) -> Allocation:
    return space.decode({c.name: nearest_milder(c, kind, value) for c in space.choices})


def nearest_milder(choice: Choice, kind: LevelKind, value: float) -> int:
    """The level that a choice takes in the uniform baseline of that value."""
    levels = levels_of(choice, kind)
    if kind == "sparsity":
        milder = [v for v in levels if v <= value]
        best = max(milder, default=None)
    else:
        milder = [v for v in levels if v >= value]
        best = min(milder, default=None)
    return levels[best] if best is not None else _base_level(choice)


def _base_level(choice: Choice) -> int:
    for level, option in enumerate(choice.options):
        if all(scheme.is_base for scheme in option.schemes):
            return level
    return len(choice.options) - 1


def _by_label(space: SearchSpace) -> list[tuple[str, Allocation]]:
    """One for each label that choices of at least half of the layers offer; the rest stay base."""
    levels = {c.name: {o.label: i for i, o in enumerate(c.options)} for c in space.choices}
    offering = Counter(label for c in space.choices for label in levels[c.name] for _ in c.layers)
    largest = max(space.choices, key=lambda c: len(c.options), default=None)
    dearest_first = [] if largest is None else [o.label for o in reversed(largest.options)]
    shared = [n for n in dearest_first if 2 * offering[n] >= len(space.searched_layers)]
    return [
        (
            f"uniform-{label}",
            space.decode(
                {c.name: levels[c.name].get(label, _base_level(c)) for c in space.choices}
            ),
        )
        for label in shared
    ]


def _without_base_and_repeats(
    named: list[tuple[str, Allocation]],
) -> tuple[tuple[str, Allocation], ...]:
    seen: set[Allocation] = set()
    kept = []
    for name, allocation in named:
        if len(allocation) and allocation not in seen:
            seen.add(allocation)
            kept.append((name, allocation))
    return tuple(kept)
