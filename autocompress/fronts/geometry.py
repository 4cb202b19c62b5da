"""Non-domination, hypervolume and knee of points that are all minimised.

numpy and moocore are imported inside the functions: reading a front does not need them, and
`autocompress front` should answer at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autocompress.core.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point dominates, every coordinate minimised.

    A point dominates another if it is nowhere worse and somewhere better. The answer for a point
    does not depend on the order of the points.

    Args:
        points: An `n x m` array. Equal points are kept or left out together. A point with a NaN
            in any coordinate is never kept and dominates nothing.

    Returns:
        An `n` array of bool.

    Raises:
        UsageError: `points` is not two-dimensional.
    """
    import moocore
    import numpy as np

    array = _as_points(points)
    kept = np.asarray(~np.isnan(array).any(axis=1), dtype=np.bool_)
    if array.shape[1] == 0 or not kept.any():
        return kept
    # Ranks keep the order and are finite: moocore 0.3 misjudges infinities in 4 dimensions.
    columns = [np.unique(column, return_inverse=True)[1] for column in array[kept].T]
    ranks = np.column_stack(columns).astype(np.float64)
    kept[kept] = moocore.is_nondominated(ranks, keep_weakly=True)
    return kept


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume between the points and the reference point, every coordinate minimised.

    Args:
        points: An `n x m` array. Points with a NaN, and points that are not better than the
            reference in every coordinate, add nothing.
        reference: The `m` coordinates of the worst corner; all finite.

    Returns:
        The volume, in the product of the coordinates' units; 0.0 without points.

    Raises:
        UsageError: the shapes do not fit, or the reference is not finite.
    """
    import moocore
    import numpy as np

    array, corner = _as_points(points), np.asarray(reference, dtype=np.float64)
    if corner.shape != (array.shape[1],) or not np.isfinite(corner).all():
        raise UsageError(
            f"A reference point has one finite coordinate per objective ({array.shape[1]}), but "
            f"got {corner.tolist()}."
        )
    inside = array[(array < corner).all(axis=1)]
    return float(moocore.hypervolume(inside, ref=corner)) if len(inside) else 0.0


def contributions(points: ArrayLike, reference: ArrayLike) -> NDArray[np.float64]:
    """Volume that each point alone dominates, below the reference point, (n,).

    Args:
        points: An `n x m` array, every coordinate minimised.
        reference: The `m` coordinates of the worst corner.
    """
    import moocore
    import numpy as np

    found = moocore.hv_contributions(_as_points(points), ref=np.asarray(reference, dtype=float))
    return np.asarray(found, dtype=np.float64)


def reference_point(points: ArrayLike, margin: float = 0.1) -> tuple[float, ...]:
    """A reference point a little worse than the worst finite point in every coordinate.

    Args:
        points: An `n x m` array; points with a NaN or an infinity are left out.
        margin: How much worse, relative to the range of the coordinate (to its magnitude where
            all points agree, to 1 where they all are 0). Above 0, so that the extreme points
            count.

    Raises:
        UsageError: no point is finite, or the margin is not positive.
    """
    import numpy as np

    array = _as_points(points)
    finite = array[np.isfinite(array).all(axis=1)]
    if not len(finite) or not margin > 0:
        raise UsageError(
            "A reference point is derived from at least one finite point with a margin above 0, "
            f"but got {len(finite)} finite of {len(array)} points and a margin of {margin}."
        )
    worst, extent = finite.max(axis=0), np.ptp(finite, axis=0)
    scale = np.where(extent > 0, extent, np.where(worst != 0, np.abs(worst), 1.0))
    return tuple(float(value) for value in worst + margin * scale)


def knee_index(cost: Sequence[float], quality: Sequence[float], *others: Sequence[float]) -> int:
    """Where the front bends: beyond this point more bytes buy little quality.

    Both axes are normalised to [0, 1] over the given points, size on a log scale since halving
    is the natural step. The knee is the point that lies furthest above the chord from (smallest,
    worst) to (largest, best); with normalised axes that is the largest difference of normalised
    quality and normalised log size (the difference curve of Kneedle: Satopää et al. 2011,
    without its smoothing, as the points are few and measured). Of equal differences the higher
    quality wins, then the fewer bytes, then the earlier point. The ends of a chord are no bend:
    fewer than three points, or a front that sags below its chord, give the point of highest
    quality.

    With several costs their normalised logs are averaged: the knee is then the point furthest
    above the plane on which quality grows with the mean of them.

    Args:
        cost: sizes, or another cost, above 0. Points with a NaN in any value are ignored.
        quality: higher is better.
        others: further costs, above 0.

    Raises:
        UsageError: the lengths differ, no point is left, or a cost is not positive.
    """
    costs = (cost, *others)
    points = list(zip(quality, *costs, strict=False))
    usable = [i for i, point in enumerate(points) if all(map(math.isfinite, point))]
    lengths = {len(quality), *map(len, costs)}
    if len(lengths) > 1 or not usable or min(min(points[i][1:]) for i in usable) <= 0:
        raise UsageError(
            "A knee is found among points that each have a size above 0 and a quality, but got "
            f"{len(cost)} sizes and {len(quality)} qualities, {len(usable)} pairs finite."
        )
    logs = [_normalised([math.log(values[i]) for i in usable]) for values in costs]
    sizes = [sum(values) / len(costs) for values in zip(*logs, strict=True)]
    qualities = _normalised([quality[i] for i in usable])

    def order(k: int) -> tuple[float, float, float, int]:
        # Rounded: normalising must not decide between points that are equally far out.
        bend = round(qualities[k] - sizes[k], 12)
        return (bend, qualities[k], -sizes[k], -k)

    return usable[max(range(len(usable)), key=order)]


def _normalised(values: Sequence[float]) -> list[float]:
    low, extent = min(values), max(values) - min(values)
    return [(value - low) / extent if extent > 0 else 0.0 for value in values]


def _as_points(points: ArrayLike) -> NDArray[np.float64]:
    import numpy as np

    array = np.asarray(points, dtype=np.float64)
    if array.ndim != 2:
        raise UsageError(
            "Points are an n x m array, one row per point and one column per objective, but got "
            f"the shape {array.shape}."
        )
    return array
