"""The scheme that a picked layer is rebuilt by: the same bytes, the most careful methods."""

from __future__ import annotations

from autocompress.core.layer import LayerSpec
from autocompress.core.scheme import Scheme, Stage
from autocompress.methods.base import METHODS
from autocompress.methods.compress import footprint
from autocompress.methods.schemes import canonical, shares


def strongest(layer: LayerSpec, scheme: Scheme) -> Scheme:
    """`scheme`, canonical, with each method replaced by its stronger one where that is as small.

    A stronger method may store more or less of some layers, e.g. where the number of pruned weights
    is rounded per row: there the method stays. Layers that share keep their scheme.

    Raises:
        SchemeError: the layer cannot take `scheme`.
    """
    current = canonical(scheme)
    if shares(current):
        return current
    size = footprint(layer, current)
    for place, stage in enumerate(current.stages):
        while name := METHODS[stage.method].stronger:
            stage = Stage(name, stage.options)  # noqa: PLW2901 - one step up
            stages = (*current.stages[:place], stage, *current.stages[place + 1 :])
            candidate = canonical(Scheme(stages))
            if footprint(layer, candidate) != size:
                break
            current = candidate
    return current
