"""Magnitude pruning of structures: remove the neurons or heads of the smallest weights.

By the squared norm of the columns that read a unit (Li et al. 2017, arXiv 1608.08710, prune filters
so; An et al. 2024, FLAP, arXiv 2312.11983, compare with it as Magnitude-SP).
"""

from __future__ import annotations

from autocompress.methods.base import METHODS, Needs
from autocompress.methods.problem import LayerProblem
from autocompress.methods.width import Chosen, Width, WidthOptions, keep_best


class MagnitudeSP(Width):
    """Removes the units of the smallest weights."""

    needs = Needs.NONE
    summary = "remove the neurons or heads that are read with the smallest weights"
    stronger = "wanda_sp"

    def choose(self, reader: LayerProblem, options: WidthOptions) -> Chosen:
        """See `Width.choose`."""
        norms = reader.weight.double().square().sum(0).view(options.of, -1).sum(1)
        return Chosen(keep_best(norms, options.keep))


METHODS.add("magnitude_sp", MagnitudeSP())
