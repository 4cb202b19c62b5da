"""Where candidates come from: predicted fronts, level swaps and crosses of the measured front."""

from __future__ import annotations

import numpy as np

from autocompress.search.guided.features import Levels
from autocompress.search.solver import Sweep

_STOP = 0.35
"""Chance that a mutation stops after each swap."""
_MOST_SWAPS = 8
_PAIRED = 0.8  # a choice goes up and another down
_JUMPED = 0.1  # a choice takes any level; the rest: one goes up alone


def spaced(
    points: Sweep, largest: float, n_points: int, generator: np.random.Generator | None = None
) -> Levels:
    """Points of a predicted front, evenly spaced in cost, (at most n_points, n_choices).

    Args:
        points: the predicted front.
        largest: total cost up to which points are wanted.
        n_points: how many.
        generator: draws the costs instead.
    """
    low, high = float(points.costs[0]), min(largest, float(points.costs[-1]))
    if high <= low:
        return points.start[None]
    if generator is None:
        wanted = np.linspace(low, high, n_points)
    else:
        wanted = generator.uniform(low, high, n_points)
    found = np.unique(np.searchsorted(points.costs, wanted, side="right") - 1)
    return np.stack([points.at(int(point)) for point in found])


def swapped(
    parents: Levels, n_options: Levels, n_children: int, generator: np.random.Generator
) -> Levels:
    """Children of random parents: some choices up, about as many down, (n_children, n_choices).

    Levels are sorted by bytes, so that a swap keeps the size nearly (the mutation of EvoPress,
    Sieberling et al. 2024); now and then a move has no counterpart, so that sizes vary.
    """
    children = parents[generator.integers(len(parents), size=n_children)].copy()
    every = np.arange(n_children)
    n_swaps = generator.geometric(_STOP, size=n_children)
    for swap in range(min(int(n_swaps.max(initial=0)), _MOST_SWAPS)):
        changed = every[n_swaps > swap]
        up, down = generator.integers(parents.shape[1], size=(2, len(changed)))
        children[changed, up] = np.minimum(children[changed, up] + 1, n_options[up] - 1)
        fate = generator.random(len(changed))
        paired, jumped = fate < _PAIRED, fate > 1 - _JUMPED
        lower = np.maximum(children[changed, down] - 1, 0)
        children[changed[paired], down[paired]] = lower[paired]
        anywhere = (generator.random(len(changed)) * n_options[up]).astype(np.int64)
        children[changed[jumped], up[jumped]] = anywhere[jumped]
    return children


def crossed(front: Levels, n_children: int, generator: np.random.Generator) -> Levels:
    """Children of neighbours on the front, sorted by cost: each choice from one of the two."""
    if len(front) < 2:
        return np.empty((0, front.shape[1]), dtype=np.int64)
    left = generator.integers(len(front) - 1, size=n_children)
    right = np.minimum(left + 1 + generator.integers(2, size=n_children), len(front) - 1)
    share = generator.uniform(0.1, 0.9, size=(n_children, 1))
    from_right = generator.random((n_children, front.shape[1])) < share
    return np.where(from_right, front[right], front[left])
