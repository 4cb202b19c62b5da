"""OWL's baselines of a study: outliers are counted once, and the record keeps what they gave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autocompress.core import Allocation
from autocompress.methods import LayerProblem
from autocompress.methods.wanda import outlier_share
from autocompress.spaces import SearchSpace
from autocompress.spaces.owl import owl_baselines, takes_part
from autocompress.workflows.session import Session

_KEY = "owl_baselines"


def resolved_owl(session: Session, dtype: str) -> dict[str, dict[str, list[int]]]:
    """What the study's record keeps: levels of all choices, by name; nothing without sparsities.

    Args:
        session: model, tokens and space.
        dtype: of the forwards that statistics come from.
    """
    choices = takes_part(session.space)
    if not choices:
        return {}
    statistics, layout = session.statistics(dtype), session.base.layout
    shares = {
        name: outlier_share(LayerProblem(session.weights[name], statistics(layout.layer(name))))
        for choice in choices
        for name in choice.layers
    }
    found = {}
    for name, allocation in owl_baselines(session.space, shares):
        levels = session.space.encode(allocation)
        found[name] = [levels[choice.name] for choice in session.space.choices]
    return {_KEY: found} if found else {}


def recorded_owl(
    resolved: Mapping[str, Any], space: SearchSpace
) -> tuple[tuple[str, Allocation], ...]:
    """The named allocations that `resolved_owl` found on the first run of a study."""
    names = [choice.name for choice in space.choices]
    return tuple(
        (name, space.decode(dict(zip(names, levels, strict=True))))
        for name, levels in resolved.get(_KEY, {}).items()
    )
