"""Wanda: weights matter by their size times the size of their input.

Sun et al. 2024 (arXiv 2306.11695), equation 1: ``|W_ij| * ||X_j||``, compared within each output
row, so that every row keeps the same number of weights; with a pattern N:M within every M
consecutive inputs of a row. ``||X_j||`` is proportional to ``sqrt(H_jj)``.
"""

from __future__ import annotations

from torch import Tensor

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


class Wanda(PruningSparsifier):
    """Keeps, in each row, the weights with the largest expected contribution."""

    needs = Needs.DIAGONAL
    summary = "drop, per output, the weights of least |weight| x |input|"

    def n_kept(self, shape: tuple[int, int], options: PruningOptions) -> int:
        """See `Sparsifier.n_kept`."""
        if options.kept_of is not None:
            kept, width = options.kept_of
            return shape[0] * shape[1] * kept // width
        return shape[0] * n_kept_of(shape[1], options.sparsity)

    def choose(self, problem: LayerProblem, options: PruningOptions) -> Pruned:
        """See `PruningSparsifier.choose`; without statistics every input counts the same."""
        scores, notes = _scores(problem), tuple[str, ...]()
        if problem.hessian is None:
            notes = ("wanda compared magnitudes per row: the layer has no calibration statistics",)
        if options.kept_of is not None:
            return Pruned(keep_pattern(scores, options.kept_of), None, notes)
        return Pruned(
            keep_highest(scores, n_kept_of(scores.shape[1], options.sparsity)), None, notes
        )


def outlier_share(problem: LayerProblem, factor: float = 5.0) -> float:
    """Share of the weights whose score is above `factor` times the mean of all, 0 to 1 (OWL)."""
    scores = _scores(problem)
    return float((scores > factor * scores.mean()).double().mean())


def _scores(problem: LayerProblem) -> Tensor:
    """``|W_ij| ||X_j||`` (o, d), up to a factor; without statistics ``|W_ij|``."""
    return problem.weight.abs() * problem.energies.sqrt()


METHODS.add("wanda", Wanda())
