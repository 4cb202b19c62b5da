"""Uniform allocations of a search space: what every search has to beat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal

from autocompress.core.allocation import Allocation
from autocompress.core.errors import SchemeError
from autocompress.core.scheme import Scheme
from autocompress.methods import METHODS, StageKind
from autocompress.spaces.space import Choice, Option, SearchSpace

LevelKind = Literal["bits", "sparsity", "parameter_ratio"]
_WITH_TRANSFORM = 2  # stages
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
    transform that half of the layers offer beside that stage makes baselines of its own
    (``uniform-4bit-hadamard``). A space that offers none of the three has one baseline for each
    label that at least half of the layers share.
    """
    kind = shared_kind(space)
    if kind is None:
        return _without_base_and_repeats(_by_label(space))
    named = []
    for transform in ("", *_shared_transforms(space, kind)):
        values = {v for c in space.choices for v in levels_of(c, kind, transform)}
        suffix = f"-{transform}" if transform else ""
        for value in values:
            found = _uniform(space, kind, value, transform)
            named.append((value, f"{_NAMES[kind](value)}{suffix}", found))
    named.sort(key=lambda one: one[0], reverse=kind != "sparsity")
    return _without_base_and_repeats([(name, found) for _, name, found in named])


def shared_kind(space: SearchSpace) -> LevelKind | None:
    """What "uniform" means in the space; None if it is the label."""
    return next((kind for kind in _KINDS if _is_shared(space, kind)), None)


def _shared_transforms(space: SearchSpace, kind: LevelKind) -> list[str]:
    schemes = [option.schemes[0] for choice in space.choices for option in choice.options]
    first = dict.fromkeys(s.stages[0].method for s in schemes if len(s.stages) == _WITH_TRANSFORM)
    named = [method for method in first if METHODS[method].kind is StageKind.TRANSFORM]
    return [transform for transform in named if _is_shared(space, kind, transform)]


def _is_shared(space: SearchSpace, kind: LevelKind, transform: str = "") -> bool:
    """True if at least half of the layers, and one, have levels of it."""
    offering = sum(len(c.layers) for c in space.choices if levels_of(c, kind, transform))
    return bool(offering) and 2 * offering >= len(space.searched_layers)


def levels_of(choice: Choice, kind: LevelKind, transform: str = "") -> dict[float, int]:
    """Value of `kind` to the level that stands for it, after a transform if one is named."""
    levels: dict[float, int] = {}
    for level, option in enumerate(choice.options):  # sorted by bytes: the dearest is kept
        value = _value(option, kind, transform)
        if value is None:
            continue
        best = levels.get(value)
        if best is None or option.storage_bytes > choice.options[best].storage_bytes:
            levels[value] = level
    return levels


def _value(option: Option, kind: LevelKind, transform: str) -> float | None:
    """The option's value of `kind` if it is a scheme of that stage and the transform, else None."""
    scheme = option.schemes[0]
    if kind == "parameter_ratio":  # resolved to ranks that differ by shape: only the label has it
        try:
            scheme = Scheme.parse(option.label)
        except SchemeError:
            return None
    *before, last = [stage.method for stage in scheme.stages] or [""]
    if not last or before != ([transform] if transform else []):
        return None
    value = dict(scheme.stages[-1].options).get(kind)
    return float(value) if isinstance(value, int | float) else None


def _uniform(space: SearchSpace, kind: LevelKind, value: float, transform: str) -> Allocation:
    return space.decode({c.name: nearest_milder(c, kind, value, transform) for c in space.choices})


def nearest_milder(choice: Choice, kind: LevelKind, value: float, transform: str = "") -> int:
    """The level that a choice takes in the uniform baseline of that value.

    A choice without the transform takes the option without one.
    """
    levels = levels_of(choice, kind, transform) or levels_of(choice, kind)
    if kind == "sparsity":
        milder = [v for v in levels if v <= value]
        best = max(milder, default=None)
    else:
        milder = [v for v in levels if v >= value]
        best = min(milder, default=None)
    return levels[best] if best is not None else _base_level(choice)


def _base_level(choice: Choice) -> int:
    for level, option in enumerate(choice.options):
        if option.is_base:
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
