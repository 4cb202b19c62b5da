"""Magnitude pruning: the smallest weights of the layer become zero.

Han et al. 2015 (arXiv 1506.02626). Compared over the whole layer; the count is exact.
"""

from __future__ import annotations

from torch import Tensor

from autocompress.methods.base import METHODS, Needs, Sparsifier, SparsityOptions
from autocompress.methods.problem import LayerProblem
from autocompress.methods.sparsity import keep_highest, n_kept_of


class Magnitude(Sparsifier[SparsityOptions]):
    """Keeps the largest weights of the layer."""

    needs = Needs.NONE
    options = SparsityOptions
    summary = "drop the smallest weights of the layer"
    stronger = "wanda"

    def n_kept(self, shape: tuple[int, int], options: SparsityOptions) -> int:
        """See `Sparsifier.n_kept`."""
        return n_kept_of(shape[0] * shape[1], options.sparsity)

    def mask(
        self, problem: LayerProblem, options: SparsityOptions
    ) -> tuple[Tensor, tuple[str, ...]]:
        """See `Sparsifier.mask`; of equal weights the first in row order are dropped."""
        weight = problem.weight
        n_kept = self.n_kept((weight.shape[0], weight.shape[1]), options)
        return keep_highest(weight.abs().view(1, -1), n_kept).view_as(weight), ()


METHODS.add("magnitude", Magnitude())
