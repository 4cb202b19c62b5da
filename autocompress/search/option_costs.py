"""What every option of a space adds to the resources of a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autocompress.core import Scheme
from autocompress.cost import CostModel, CostPart
from autocompress.models import ModelLayout
from autocompress.search.option_table import OptionCosts
from autocompress.spaces import Choice, SearchSpace


def option_costs(space: SearchSpace, layout: ModelLayout, cost: CostModel) -> OptionCosts:
    """What every option adds to every resource that sums over layers, from shapes alone."""
    parts = [
        [_parts(layout, cost, choice, level) for level in range(len(choice.options))]
        for choice in space.choices
    ]
    searched = set(space.searched_layers)
    base = [cost.part(layer, Scheme()) for layer in cost.layers if layer.name not in searched]
    fixed = [cost.rest.additive(cost.profile), *(p.additive(cost.profile) for p in base)]
    return OptionCosts(
        added={
            resource: tuple(
                np.array([_sum(level, resource, cost) for level in rows], dtype=np.float64)
                for rows in parts
            )
            for resource in fixed[0]
        },
        fixed={resource: float(sum(part[resource] for part in fixed)) for resource in fixed[0]},
    )


def _sum(parts: Sequence[CostPart], resource: str, cost: CostModel) -> float:
    return sum(part.additive(cost.profile)[resource] for part in parts)


def _parts(layout: ModelLayout, cost: CostModel, choice: Choice, level: int) -> list[CostPart]:
    schemes = choice.options[level].schemes
    return [cost.part(layout.layer(n), s) for n, s in zip(choice.layers, schemes, strict=True)]
