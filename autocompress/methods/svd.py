"""Truncated singular value decomposition: the nearest matrix of rank r (Eckart and Young 1936)."""

from __future__ import annotations

from torch import Tensor

from autocompress.methods.base import METHODS, Factorizer, Needs
from autocompress.methods.low_rank import RankOptions, split
from autocompress.methods.problem import LayerProblem


class SVD(Factorizer[RankOptions]):
    """Best approximation of the weight itself."""

    needs = Needs.NONE
    options = RankOptions
    summary = "two thin factors from the singular value decomposition"
    stronger = "svd_llm"

    def rank(self, options: RankOptions) -> int:
        """See `Factorizer.rank`."""
        return options.rank

    def factorize(
        self, problem: LayerProblem, options: RankOptions
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """See `Factorizer.factorize`."""
        outer, inner = split(problem.spectrum, options.rank)
        return outer, inner, ()


METHODS.add("svd", SVD())
