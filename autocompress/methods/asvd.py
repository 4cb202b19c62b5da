"""ASVD: truncated singular value decomposition after loud inputs were scaled up.

Yuan et al. 2023 (arXiv 2312.05821): with ``S = diag(m^alpha)`` the nearest matrix of
rank r to ``W S``, times ``S^-1``. The paper's m is the mean of ``|x_j|``; here it is the root of
the damped mean square of x_j, which calibration has. It sees the sizes of the inputs but not their
correlations: between `svd` and `svd_llm`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from autocompress.core.errors import SchemeError
from autocompress.methods.base import METHODS, Factorizer, Needs
from autocompress.methods.low_rank import RankOptions, split
from autocompress.methods.problem import LayerProblem, LayerStatistics, Spectrum


@dataclass(frozen=True, slots=True)
class ASVDOptions(RankOptions):
    """Options of the decomposition.

    Attributes:
        rank: inner dimension of the factors, at least 1; below break-even for the layer.
        alpha: power of the input sizes, 0 (that is `svd`) to 1.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        RankOptions.__post_init__(self)
        if not 0 <= self.alpha <= 1:
            raise SchemeError(
                f"alpha must be 0 to 1, but got {self.alpha}. "
                f"The nearest legal value is {0.0 if self.alpha < 0 else 1.0}."
            )


class ASVD(Factorizer[ASVDOptions]):
    """Best approximation of the weight with its inputs scaled."""

    needs = Needs.DIAGONAL
    options = ASVDOptions
    summary = "two thin factors from the weight scaled by the size of its inputs"

    def rank(self, options: ASVDOptions) -> int:
        """See `Factorizer.rank`."""
        return options.rank

    def factorize(
        self, problem: LayerProblem, options: ASVDOptions
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """See `Factorizer.factorize`; without statistics the plain decomposition."""
        notes: tuple[str, ...] = ()
        if problem.hessian is None:
            notes = ("asvd did not scale: the layer has no calibration statistics",)
        scales = problem.importance ** (options.alpha / 2)

        def scaled() -> LayerProblem:
            return LayerProblem(problem.weight * scales, LayerStatistics.none())

        spectrum = problem.derived(("asvd", options.alpha), scaled).spectrum
        unscaled = Spectrum(spectrum.outer, spectrum.inner / scales, spectrum.energies)
        outer, inner = split(unscaled, options.rank)
        return outer, inner, notes


METHODS.add("asvd", ASVD())
