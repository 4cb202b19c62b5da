"""SVD-LLM: the matrix of rank r whose outputs are nearest.

Wang et al. 2025 (arXiv 2403.07378), truncation-aware whitening: the singular values of ``W L``,
``L L^T = H``, are the losses, so the loss at rank r is exactly the sum of the squares of those
left out. Neither L nor its inverse is formed (see `spectrum_of`).
"""

from __future__ import annotations

from torch import Tensor

from autocompress.methods.base import METHODS, Factorizer, Needs
from autocompress.methods.low_rank import RankOptions, split
from autocompress.methods.problem import LayerProblem


class SVDLLM(Factorizer[RankOptions]):
    """Best approximation of the layer's outputs."""

    needs = Needs.HESSIAN
    options = RankOptions
    summary = "two thin factors that keep the layer's outputs (whitened by its inputs)"

    def rank(self, options: RankOptions) -> int:
        """See `Factorizer.rank`."""
        return options.rank

    def factorize(
        self, problem: LayerProblem, options: RankOptions
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """See `Factorizer.factorize`; without statistics the plain decomposition."""
        notes: tuple[str, ...] = ()
        if problem.unseen:
            notes = (f"svd_llm used the plain decomposition: {problem.unseen}",)
        outer, inner = split(problem.whitened_spectrum, options.rank)
        return outer, inner, notes


METHODS.add("svd_llm", SVDLLM())
