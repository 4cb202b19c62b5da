"""Basis Sharing: layers of adjacent blocks share the factor on the side of their inputs.

Wang et al. 2024 (arXiv 2410.03765): with the weights stacked, ``[W_1; ...; W_n]`` (n o, d), and
whitened by the inputs of all of them together, ``H = sum_i H_i``, the best matrix of rank r is
``A B``; B (r, d) is the basis that all layers share, and the rows of A are the coefficients of
each. Parameters ``r (n o + d)`` instead of ``n r (o + d)``. Each layer then fits its coefficients
to its own inputs, ``A_i = W_i H_i B^T (B H_i B^T)^-1``, which can only lower its loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from autocompress.methods.base import METHODS, Factorizer, Needs
from autocompress.methods.low_rank import RankOptions, split
from autocompress.methods.problem import LayerProblem
from autocompress.methods.sharing import Sharing, read_numbers


@dataclass(frozen=True, slots=True)
class BasisOptions(RankOptions):
    """Options of `basis_sharing`.

    Attributes:
        rank: of the basis, at least 1; below break-even for the layers that share.
        blocks: numbers in the names of the layers that share, as ``0/1``; a search space says it
            by `span`.
    """

    blocks: str = ""

    def __post_init__(self) -> None:
        RankOptions.__post_init__(self)
        read_numbers(self.blocks)


class BasisSharing(Factorizer[BasisOptions], Sharing):
    """One basis for layers of adjacent blocks, coefficients of each."""

    needs = Needs.HESSIAN
    options = BasisOptions
    summary = "two thin factors, the one on the inputs' side shared by layers of adjacent blocks"

    def rank(self, options: BasisOptions) -> int:
        """See `Factorizer.rank`."""
        return options.rank

    def is_shared(self, tensor: str) -> bool:
        """See `Sharing.is_shared`: the basis is."""
        return tensor.startswith("b.")

    def factorize(
        self, problem: LayerProblem, options: BasisOptions
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """See `Factorizer.factorize`, of all layers stacked: A (n o, r) and B (r, d)."""
        notes: tuple[str, ...] = ()
        if problem.unseen:
            notes = (f"basis_sharing used the plain decomposition: {problem.unseen}",)
        outer, inner = split(problem.whitened_spectrum, options.rank)
        return outer, inner, notes


METHODS.add("basis_sharing", BasisSharing())
