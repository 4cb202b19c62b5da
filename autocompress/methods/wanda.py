"""Wanda: weights matter by their size times the size of their input.

Sun et al. 2024 (arXiv 2306.11695), equation 1: ``|W_ij| * ||X_j||``, compared within each output
row, so that every row keeps the same number of weights. ``||X_j||`` is proportional to
``sqrt(H_jj)``.
"""

from __future__ import annotations

from torch import Tensor

from autocompress.methods.base import METHODS, Needs, Sparsifier, SparsityOptions
from autocompress.methods.problem import LayerProblem
from autocompress.methods.sparsity import keep_highest, n_kept_of


class Wanda(Sparsifier[SparsityOptions]):
    """Keeps, in each row, the weights with the largest expected contribution."""

    needs = Needs.DIAGONAL
    options = SparsityOptions
    summary = "drop, per output, the weights of least |weight| x |input|"

    def n_kept(self, shape: tuple[int, int], options: SparsityOptions) -> int:
        """See `Sparsifier.n_kept`."""
        return shape[0] * n_kept_of(shape[1], options.sparsity)

    def mask(
        self, problem: LayerProblem, options: SparsityOptions
    ) -> tuple[Tensor, tuple[str, ...]]:
        """See `Sparsifier.mask`; without statistics every input counts the same."""
        n_kept = n_kept_of(problem.weight.shape[1], options.sparsity)
        if problem.hessian is None:
            note = "wanda compared magnitudes per row: the layer has no calibration statistics"
            return keep_highest(problem.weight.abs(), n_kept), (note,)
        norms = problem.hessian.diagonal().clamp(min=0).sqrt()
        return keep_highest(problem.weight.abs() * norms, n_kept), ()


METHODS.add("wanda", Wanda())
