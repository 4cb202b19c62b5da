"""OWL: layers with more outliers keep more of their weights.

Yin et al. 2023 (arXiv 2310.05175, "Outlier Weighed Layerwise Sparsity"): D_l is the share of a
layer's weights with ``|W_ij| ||X_j||`` above M times the layer's mean. At a total sparsity S the
layer gets ``S_l = S - band * (D_l - mean D) / max |D_k - mean D|``: within `band` of S, and S on
average over all weights. Then each takes the nearest sparsity that its choice offers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autocompress.core.allocation import Allocation
from autocompress.spaces.baselines import levels_of, nearest_milder, shared_kind, uniform_baselines
from autocompress.spaces.space import Choice, SearchSpace

BAND = 0.08
LEAST_LEVELS = 3
"""Sparsities that a choice must offer to take part; the others are as in the uniform baseline."""


def owl_sparsities(
    outlier_shares: Sequence[float], sizes: Sequence[float], sparsity: float, band: float = BAND
) -> tuple[float, ...]:
    """Sparsity of each layer; weighted by `sizes` their mean is `sparsity`.

    Args:
        outlier_shares: D of each layer, 0 to 1.
        sizes: weights of each layer.
        sparsity: in total, above 0 and below 1.
        band: how far a layer may be from it; less where it would leave 0 to 1.
    """
    pairs = list(zip(outlier_shares, sizes, strict=True))
    mean = sum(share * size for share, size in pairs) / sum(sizes)
    if max(outlier_shares) == min(outlier_shares):
        return (sparsity,) * len(pairs)
    widest = max(abs(share - mean) for share in outlier_shares)
    step = min(band, sparsity, 1 - sparsity) / widest
    return tuple(sparsity - step * (share - mean) for share in outlier_shares)


def takes_part(space: SearchSpace) -> tuple[Choice, ...]:
    """The choices whose sparsity OWL decides; none if the uniform baselines are no sparsities."""
    if shared_kind(space) != "sparsity":
        return ()
    return tuple(c for c in space.choices if len(levels_of(c, "sparsity")) >= LEAST_LEVELS)


def owl_baselines(
    space: SearchSpace, outlier_shares: Mapping[str, float]
) -> tuple[tuple[str, Allocation], ...]:
    """``owl-50%-sparse`` and so on, at the sparsities of the uniform baselines, mildest first.

    Allocations that are among those, or came before, are left out.

    Args:
        space: offers sparsities; without any there are no baselines.
        outlier_shares: D of each layer of `takes_part`, by name.
    """
    choices = takes_part(space)
    if not choices:
        return ()
    sizes = [choice.base_bytes or len(choice.layers) for choice in choices]
    shares = [sum(outlier_shares[n] for n in c.layers) / len(c.layers) for c in choices]
    seen = {allocation for _, allocation in uniform_baselines(space)}
    found = []
    for total in sorted({value for c in choices for value in levels_of(c, "sparsity")}):
        levels = {c.name: nearest_milder(c, "sparsity", total) for c in space.choices}
        wanted = owl_sparsities(shares, sizes, total)
        levels |= {c.name: _nearest(c, value) for c, value in zip(choices, wanted, strict=True)}
        allocation = space.decode(levels)
        if allocation not in seen:
            seen.add(allocation)
            found.append((f"owl-{100 * total:g}%-sparse", allocation))
    return tuple(found)


def _nearest(choice: Choice, sparsity: float) -> int:
    """The level whose sparsity is nearest; of two, the milder one."""
    levels = levels_of(choice, "sparsity")
    return levels[min(levels, key=lambda value: (round(abs(value - sparsity), 9), value))]
