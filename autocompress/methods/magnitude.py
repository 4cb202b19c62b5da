"""Magnitude pruning: the smallest weights of the layer become zero.

Han et al. 2015 (arXiv 1506.02626). Compared over the whole layer, or with a pattern N:M within
every M consecutive inputs of a row; the count is exact.
"""

from __future__ import annotations

from autocompress.methods.base import METHODS, Needs
from autocompress.methods.problem import LayerProblem
from autocompress.methods.sparsity import (
    Pruned,
    PruningOptions,
    PruningSparsifier,
    keep_highest,
    keep_pattern,
    n_kept_of,
)


class Magnitude(PruningSparsifier):
    """Keeps the largest weights of the layer."""

    needs = Needs.NONE
    summary = "drop the smallest weights of the layer"
    stronger = "wanda"

    def n_kept(self, shape: tuple[int, int], options: PruningOptions) -> int:
        """See `Sparsifier.n_kept`."""
        if options.kept_of is not None:
            kept, width = options.kept_of
            return shape[0] * shape[1] * kept // width
        return n_kept_of(shape[0] * shape[1], options.sparsity)

    def choose(self, problem: LayerProblem, options: PruningOptions) -> Pruned:
        """See `PruningSparsifier.choose`; of equal weights the first in row order are dropped."""
        scores = problem.weight.abs()
        if options.kept_of is not None:
            return Pruned(keep_pattern(scores, options.kept_of), None)
        n_kept = n_kept_of(scores.numel(), options.sparsity)
        return Pruned(keep_highest(scores.view(1, -1), n_kept).view_as(scores), None)


METHODS.add("magnitude", Magnitude())
